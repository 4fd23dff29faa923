// Unpacks the latents, and shows those that are searched for, sorted, as they are scrolled to.
(async () => {
  "use strict";
  const KINDS = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
  const $ = (id) => document.getElementById(id);
  const PAGE = 20;  // latents drawn at a time

  async function unpack(text) {
    const zipped = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const length = new DataView(buffer).getUint32(0, true);
    const { arrays, ...header } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const base = 4 + length;
    for (const [name, [kind, at, n]] of Object.entries(arrays))
      header[name] = new KINDS[kind](buffer, base + at, n);
    return header;
  }

  const D = await unpack($("data").textContent);
  const N = D.latent.length;  // of both sides, where a null arm stands beside
  const second = (i) => Boolean(D.side?.[i]);
  const FIRST = D.side ? D.side.reduce((n, s) => n + !s, 0) : N;
  const BINS = D.histogram.length / N;
  const DEAD = D.dead.reduce((n, dead, i) => n + (dead && !second(i)), 0);
  const row = new Map([...D.latent].map((l, i) => [l, i]).filter(([, i]) => !second(i)));
  const range = (end, i) => [i ? end[i - 1] : 0, end[i]];
  const texts = (i) => range(D.example_end, i).reduce((a, b) => b - a);  // contexts of a latent
  const everyOf = (end, i, get) => {
    const [a, b] = range(end, i);
    return Array.from({ length: b - a }, (_, j) => get(a + j));
  };
  const visible = (s) => s.replace(/\r\n|\r|\n/g, "↵").replace(/\t/g, "→");

  // --- search -------------------------------------------------------------------------------

  const made = {};  // where -> one lower-case string a latent, made when first searched
  function text(where) {
    made[where] ??= Array.from({ length: N }, (_, i) => {
      if (where === "logits") return everyOf(D.top_end, i, (j) => D.words[D.top_token[j]]).join("\n").toLowerCase();
      return everyOf(D.example_end, i, (e) => {
        const [a, b] = range(D.token_end, e);
        if (where === "peak") return D.words[D.token[a + D.peak[e]]];
        return Array.from(D.token.subarray(a, b), (t) => D.words[t]).join("");
      }).join("\n").toLowerCase();
    });
    return made[where];
  }

  const numbered = (query) => (/^#?\d+$/.test(query.trim()) ? Number(query.trim().replace("#", "")) : -1);

  function matches(query, where) {
    const q = query.toLowerCase(), number = numbered(query);
    const fields = (where === "any" ? ["context", "logits"] : [where]).map(text);
    return (i) => D.latent[i] === number || fields.some((f) => f[i].includes(q));
  }

  // --- what is shown ------------------------------------------------------------------------

  const state = { only: null, shown: [], beside: [], drawn: 0, descending: true };

  function select() {
    const query = $("search").value, key = $("sort").value;
    const [low, high] = $("fires").value.split(" ").map(Number);
    const label = $("label").value === "" ? -1 : Number($("label").value);
    const hit = query ? matches(query, $("where").value) : () => true;
    const exact = numbered(query), least = Number($("seen").value);
    const live = (i) => D.density[i] >= low && D.density[i] <= high && texts(i) >= least;
    const keep = (i) =>
      (D.dead[i] ? $("dead").checked : live(i)) && (label < 0 || D.top_label[i] === label) && hit(i);
    const sign = state.descending ? -1 : 1;
    const found = [...Array(N).keys()].filter((i) => D.latent[i] === exact || keep(i)).sort((a, b) =>
      (D.latent[b] === exact) - (D.latent[a] === exact) ||
      sign * (D[key][a] - D[key][b]) || D.latent[a] - D.latent[b]);
    state.shown = found.filter((i) => !second(i));
    state.beside = $("beside")?.checked ? found.filter(second) : [];
  }

  function refresh() {
    if (state.only === null) select();
    else [state.shown, state.beside] = [row.has(state.only) ? [row.get(state.only)] : [], []];
    state.drawn = 0;
    $("list").replaceChildren();
    $("order").textContent = state.descending ? "↓ largest first" : "↑ smallest first";
    $("count").replaceChildren(...counted());
    more();
  }

  function counted() {
    const n = (x) => x.toLocaleString("en");
    if (state.only !== null) {
      const back = make("button", "", "show all latents");
      back.id = "only";
      back.type = "button";
      back.addEventListener("click", () => { location.hash = ""; });
      return [`Latent ${state.only}${state.shown.length ? "" : " does not exist"}. `, back];
    }
    const rare = [...Array(FIRST).keys()].filter((i) => !D.dead[i] && texts(i) < Number($("seen").value)).length;
    const hidden = [];
    if (DEAD && !$("dead").checked) hidden.push(`${n(DEAD)} that never fire`);
    if (rare) hidden.push(`${n(rare)} seen in fewer texts`);
    const also = state.beside.length ? `, beside ${n(state.beside.length)} of ${n(N - FIRST)}` : "";
    return [`${n(state.shown.length)} of ${n(FIRST)} latents${also}${hidden.length ? `; hidden: ${hidden.join(", ")}` : ""}`];
  }

  function more() {
    const next = state.shown.slice(state.drawn, state.drawn + PAGE);
    $("list").append(...next.map((i, k) => pair(i, state.beside[state.drawn + k])));
    state.drawn += next.length;
    $("more").textContent = state.drawn < state.shown.length ? "more below…" : "";
  }

  function pair(i, j) {
    if (!state.beside.length) return card(i);
    const other = j === undefined ? make("p", "quiet small", `no more of ${D.sides[1]}`) : card(j);
    return make("div", "pair", card(i), other);
  }

  // --- one latent ---------------------------------------------------------------------------

  function make(tag, cls, ...children) {
    const e = document.createElement(tag);
    if (cls) e.className = cls;
    e.append(...children);
    return e;
  }

  const brief = (x) => (x === 0 ? "0" : Math.abs(x) < 1e-3 ? x.toExponential(1) : Number(x.toPrecision(3)).toString());
  const share = (x) => `${Number((100 * x).toPrecision(2))} %`;

  function facts(i) {
    const out = [["fires on", `${share(D.density[i])} of tokens`], ["largest", brief(D.max_act[i])], ["mean", brief(D.mean_act[i])]];
    if (D.top_label && D.labels[D.top_label[i]]) out.push([`${D.labels[D.top_label[i]]}:`, share(D.label_share[i])]);
    if (D.token_share) out.push(["on one token", share(D.token_share[i])]);
    return out.map(([k, v]) => make("span", "fact", `${k} `, make("b", "", v)));
  }

  function histogram(i) {
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", `0 0 ${BINS * 4} 46`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "histogram of its activations");
    for (let b = 0; b < BINS; b++) {
      const level = D.histogram[i * BINS + b];
      if (!level) continue;
      const bar = document.createElementNS(ns, "rect");
      const height = Math.max(1, (level / 255) * 44);
      for (const [k, v] of Object.entries({ x: b * 4, y: 45 - height, width: 3.2, height })) bar.setAttribute(k, v);
      svg.append(bar);
    }
    return svg;
  }

  function chips(name, side, i) {
    const p = make("p", "logits", make("span", "name", name));
    everyOf(D[`${side}_end`], i, (j) => {
      const word = visible(D.words[D[`${side}_token`][j]]);
      const lead = word.match(/^ */)[0].length;
      const chip = make("span", "chip mono", make("span", "space", "·".repeat(lead)), word.slice(lead));
      const value = D[`${side}_value`][j];
      chip.title = `${value > 0 ? "+" : ""}${value.toFixed(2)}`;
      p.append(chip, " ");
    });
    return p;
  }

  function context(i, e) {
    const [a, b] = range(D.token_end, e);
    const p = make("p", "context");
    if (D.title && D.titles[D.title[e]]) p.append(make("span", "title", D.titles[D.title[e]]));
    for (let t = a; t < b; t++) {
      const level = D.level[t], peak = t - a === D.peak[e];
      const shown = visible(D.words[D.token[t]]);
      const word = t === a ? shown.trimStart() || shown : shown;
      if (!level && !peak) { p.append(word); continue; }
      const bare = word.trimStart() || word || "⋯";  // first bytes of the character that follows
      const span = make("span", peak ? "t peak" : "t", bare);
      span.style.backgroundColor = `rgb(var(--heat) / ${(0.1 + 0.8 * level / 255).toFixed(2)})`;
      span.title = `activation ${brief(D.max_act[i] * level / 255)}`;
      p.append(word.slice(0, word.length - bare.length), span);
    }
    return p;
  }

  function card(i) {
    const link = make(second(i) ? "span" : "a", "", `latent ${D.latent[i]}`);
    if (!second(i)) link.href = `#latent=${D.latent[i]}`;
    const contexts = make("div", "contexts", ...everyOf(D.example_end, i, (e) => context(i, e)));
    const side = make("div", "", histogram(i),
      make("div", "scale", make("span", "", "0"), make("span", "", "its activations"), make("span", "", brief(D.max_act[i]))),
      chips("raises", "top", i), chips("lowers", "bottom", i));
    const whose = state.beside.length ? [make("p", "whose quiet small", D.sides[D.side[i]])] : [];
    const out = make("article", D.dead[i] ? "latent dead" : "latent", ...whose,
      make("div", "head", make("h2", "", link), ...facts(i)), make("div", "body", side, contexts));
    out.dataset.latent = D.latent[i];
    return out;
  }

  // --- controls -----------------------------------------------------------------------------

  for (const s of D.sorts) $("sort").add(new Option(s.label, s.key));
  for (const option of $("sort").options) option.title = D.sorts.find((s) => s.key === option.value).help;
  $("label").add(new Option("any", ""));
  [...D.labels.keys()].filter((l) => D.labels[l]).sort((a, b) => D.labels[a].localeCompare(D.labels[b]))
    .forEach((l) => $("label").add(new Option(D.labels[l], l)));
  const MOST = Math.max(1, ...Array.from({ length: N }, (_, i) => texts(i)));
  // a latent that fires in a text or two looks clear by chance: it waits behind the second choice
  $("seen").add(new Option(MOST > 1 ? `at least ${MOST} texts` : "1 text", MOST));
  if (MOST > 1) $("seen").add(new Option("any number of texts", 0));
  $("labels").hidden = $("label").options.length < 2;

  const CONTROLS = ["search", "where", "sort", "label", "fires", "seen"];
  const initial = Object.fromEntries(CONTROLS.map((id) => [id, $(id).value]));

  const falling = () => $("sort").value !== "latent";  // the usual order of a sort

  // the address says what is shown, so that a link shows the same
  function remember() {
    const found = new URLSearchParams();
    for (const id of CONTROLS) if ($(id).value !== initial[id]) found.set(id, $(id).value);
    if ($("dead").checked) found.set("dead", "1");
    if ($("beside")?.checked === false) found.set("alone", "1");
    if (state.descending !== falling()) found.set("order", state.descending ? "down" : "up");
    history.replaceState(null, "", `#${found}`);
  }

  function recall() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    state.only = wanted.has("latent") ? Number(wanted.get("latent")) : null;
    for (const id of CONTROLS) $(id).value = wanted.get(id) ?? initial[id];
    $("dead").checked = wanted.has("dead");
    if ($("beside")) $("beside").checked = !wanted.has("alone");
    state.descending = wanted.has("order") ? wanted.get("order") === "down" : falling();
    refresh();
    if (state.only !== null) scrollTo(0, 0);
  }

  function changed() {
    state.only = null;
    remember();
    refresh();
  }

  let waiting;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(changed, 120); });
  for (const id of ["where", "label", "fires", "seen", "dead"]) $(id).addEventListener("change", changed);
  $("beside")?.addEventListener("change", changed);
  $("sort").addEventListener("change", () => { state.descending = falling(); changed(); });
  $("order").addEventListener("click", () => { state.descending = !state.descending; changed(); });
  $("controls").addEventListener("submit", (e) => { e.preventDefault(); changed(); });
  addEventListener("hashchange", recall);
  new IntersectionObserver((seen) => {
    if (seen.some((s) => s.isIntersecting) && state.drawn < state.shown.length) more();
  }, { rootMargin: "800px" }).observe($("more"));
  recall();
  document.documentElement.dataset.features = "shown";
})();
