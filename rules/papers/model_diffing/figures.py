"""Figures of this paper: decoder norms, latent scaling, KL closed, intruders by rank."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.parts import Drawn, Panels, bars, line, nothing, points, steps, whiskers
from pipeline.figures.theme import INK, PALETTE

OBJECTIVES = {"l1": ("L1", PALETTE[1]), "batchtopk": ("BatchTopK", PALETTE[0])}
PAIRS = {"full": "all weights tuned", "lora": "LoRA", "copy": "a copy of the base"}
SUBSETS = {
    "none": "none (the base's stream)", "smaller": "half with smaller Δnorm",
    "random": "random half (null)", "larger": "half with larger Δnorm",
    "higher_nu": "half with higher ν", "lower_nu": "half with lower ν", "top": "both halves",
    "all": "all latents",
}  # fmt: skip
BINS = np.linspace(0, 1, 41)
NU = (-0.2, 1.3)  # of ν that is drawn


def latents(tables: dict[str, Any], source: str = "") -> pd.DataFrame:
    """Rows of latents that fire, of the source base or the tuned model, with their crosscoder's."""
    table = tables["crosscoders/base_latents"]
    parts = table["sae"].str.rsplit("_", n=2, expand=True)
    seed = parts[2].str.removeprefix("seed").astype(int)
    table = table.assign(objective=parts[0], pair=parts[1], seed=seed)
    wanted = table["source"] == ("base" if source == "base" else table["pair"])
    return table[wanted & (table["density"] > 0)].reset_index(drop=True)


def norms(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Histograms of Δnorm, a panel a pair of models; all seeds are counted together."""
    table, rows = latents(tables), []
    panels = Panels(list(PAIRS.values()), shared_yaxes=True)
    for i, pair in enumerate(PAIRS):
        for objective, (name, colour) in OBJECTIVES.items():
            own = table[(table["pair"] == pair) & (table["objective"] == objective)]
            share = np.histogram(own["delta"], BINS)[0] / max(len(own), 1)
            hover = f"{name}, Δnorm %{{x:.2f}}: %{{y:.2%}} of latents"
            panels.add(i, steps(BINS, np.maximum(share, 1e-4), name, colour, hover=hover))
            rows += [{"pair": pair, "objective": objective, "low": low, "share": s}
                     for low, s in zip(BINS, share, strict=False)]  # fmt: skip
    panels.figure.update_yaxes(type="log", range=[-4, 0.1], tickformat=".2~%")
    panels.axes(x="Δnorm", y="share of latents")
    return panels.finish(340), pd.DataFrame(rows)


def scaling(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """ν_r against ν_ε of latents that norms call tuned-only, beside shared ones."""
    table = latents(tables, "base")
    table = table[table["pair"] == options.get("pair", "full")]
    mine = table[(table["kind"] == "exclusive") & (table["own"] == table["pair"])]
    if mine.empty:
        return nothing("No latent is called tuned-only."), mine
    panels = Panels([name for name, _ in OBJECTIVES.values()])
    for i, (objective, (_, colour)) in enumerate(OBJECTIVES.items()):
        shared = table[(table["objective"] == objective) & (table["kind"] == "shared")]
        own = mine[mine["objective"] == objective]
        cases = {"shared": (shared.head(400), INK), "tuned-only by Δnorm": (own, colour)}
        for name, (rows, look) in cases.items():
            x, y = (rows[c].clip(*NU) for c in ("nu_r", "nu_e"))
            hover = f"{name}: ν<sub>r</sub> %{{x:.2f}}, ν<sub>ε</sub> %{{y:.2f}}"
            panels.add(i, points(x, y, name, look, size=5, opacity=0.6, hover=hover))
        panels.add(i, line([NU[0], 0.5, 0.5], [0.2, 0.2, NU[0]], "confirmed below", dash="dash"))
    panels.figure.update_xaxes(range=list(NU))
    panels.figure.update_yaxes(range=list(NU))
    panels.axes(x="ν<sub>r</sub>: in the base's reconstruction", y="ν<sub>ε</sub>: in its error")
    kept = ["objective", "seed", "latent", "delta", "nu_r", "nu_e", "confirmed"]
    return panels.finish(400), mine[kept]


def closed(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """KL that is left, a bar a subset; whiskers from the least to the most over seeds."""
    table = tables["closed/closed"]
    subset = table["subset"].str.replace(r"_\d+$", "", regex=True)
    each = table.assign(subset=subset).groupby(["arm", "objective", "subset", "seed"])["kl"].mean()
    found = each.groupby(level=[0, 1, 2]).agg(["mean", "min", "max"]).reset_index()
    arms = [a for a in PAIRS if a != "copy" and a in set(found["arm"])]
    titles = [name for name, _ in OBJECTIVES.values()]
    panels = Panels(titles, 1, gap=(0.05, 0.2))
    for case, arm in enumerate(arms):
        for i, (objective, (_, colour)) in enumerate(OBJECTIVES.items()):
            own = found[(found["arm"] == arm) & (found["objective"] == objective)]
            own = own.set_index("subset").reindex(list(SUBSETS))
            spread = whiskers(own["mean"], own["min"], own["max"])
            panels.add(i, bars(list(SUBSETS.values()), own["mean"], colour=colour, error_y=spread,
                               hover="%{x}: %{y:.4f} nats"), case=case)  # fmt: skip
    panels.choose([PAIRS[a] for a in arms])
    panels.axes(y="KL from the tuned model, nats")
    return panels.finish(620, top=90, showlegend=False), found


def intruders(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Intruders a matrix, a bar an arm; the reader chooses ε."""
    table = tables["updates/intruders"]
    each = table.groupby(["epsilon", "arm", "seed"])["intruders"].mean()
    found = each.groupby(level=[0, 1]).agg(["mean", "min", "max"]).reset_index()
    names = {arm: name for arm, name in options["names"] if arm in set(found["arm"])}
    panels, epsilons = Panels(), sorted(set(found["epsilon"]), key=lambda e: abs(e - 0.5))
    for case, epsilon in enumerate(epsilons):
        own = found[found["epsilon"] == epsilon].set_index("arm").reindex(list(names))
        spread = whiskers(own["mean"], own["min"], own["max"])
        panels.add(0, bars(list(names.values()), own["mean"], colour=PALETTE[0], error_y=spread,
                           hover="%{x}: %{y:.2f}"), case=case)  # fmt: skip
    panels.choose([f"ε = {e:g}" for e in epsilons])
    panels.axes(y="intruders a matrix, of the first 10")
    return panels.finish(380, top=80, showlegend=False), found
