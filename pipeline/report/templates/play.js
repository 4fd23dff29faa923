// Figures that a reader plays with: lists and sliders, each with a key and a finger, and a sentence
// that says what is seen. draw.js calls this for figures with layout.meta.play:
//   controls  [{name, values, slider}]: what a reader chooses; values are texts
//   shown     [{traces, by, states}]: the state under the places of the controls `by`, joined by
//             commas, is what Plotly.restyle does to these traces
//   said      [{by, states}]: likewise sentences
//   start     the place of each control at first
//   tap       {trace, control}: a tap on a point whose text is a value of that control chooses it
globalThis.retracePlay = (() => {
  "use strict";
  const places = new Map();  // figure -> the place of each control
  const key = (by, at) => by.map((c) => at[c]).join(",");

  const exists = (play, at) => play.shown.every((s) => key(s.by, at) in s.states);

  // the first place near `at` that exists, with control `kept` where it is; later controls give way first
  function near(play, at, kept) {
    const tries = play.controls.map((c, i) => {
      if (i === kept) return [at[i]];
      const every = [...c.values.keys()];
      const far = (v) => (c.slider ? Math.abs(v - at[i]) : v === at[i] ? -1 : v);
      return every.sort((a, b) => far(a) - far(b));
    });
    const search = (done) => {
      if (done.length === tries.length) return exists(play, done) ? done : null;
      for (const v of tries[done.length]) {
        const found = search([...done, v]);
        if (found) return found;
      }
      return null;
    };
    return search([]);
  }

  function element(tag, parent, more = {}) {
    const made = Object.assign(document.createElement(tag), more);
    parent.append(made);
    return made;
  }

  function range(box, control, choose) {
    const label = element("label", box, { textContent: `${control.name} ` });
    const input = element("input", label, { type: "range", min: 0, max: control.values.length - 1 });
    const told = element("output", label);
    for (const [step, sign, word] of [[-1, "‹", "previous"], [1, "›", "next"]]) {
      const button = element("button", box, { type: "button", textContent: sign });
      button.ariaLabel = `${word} ${control.name}`;
      button.addEventListener("click", () => choose(Number(input.value) + step));
    }
    input.addEventListener("input", () => choose(Number(input.value)));
    return (v) => {
      input.value = v;
      input.ariaValueText = told.textContent = control.values[v];
    };
  }

  function list(box, control, choose, there) {
    const label = element("label", box, { textContent: `${control.name} ` });
    const select = element("select", label);
    control.values.forEach((text) => select.add(new Option(text)));
    select.addEventListener("change", () => choose(select.selectedIndex));
    return (v) => {
      [...select.options].forEach((o, i) => { o.hidden = o.disabled = i !== v && !there(i); });
      select.selectedIndex = v;
    };
  }

  return async function playable(figure, canvas, play) {
    figure.querySelector(".retrace-play")?.remove();
    const box = document.createElement("div");
    box.className = "retrace-play";
    box.role = "group";
    box.ariaLabel = "what is shown";
    figure.prepend(box);
    let at = places.get(figure) ?? near(play, play.start, -1);
    let busy = false, drawn = null;
    const choose = (c) => (v) => {
      if (v < 0 || v >= play.controls[c].values.length) return;
      const to = at.map((old, i) => (i === c ? v : old));
      at = (exists(play, to) ? to : near(play, to, c)) ?? at;
      show();
    };
    const set = play.controls.map((control, c) => {
      const room = element("div", box, { className: "retrace-choice" });
      const there = (v) => exists(play, at.map((old, i) => (i === c ? v : old))) || c === 0;
      return control.slider ? range(room, control, choose(c)) : list(room, control, choose(c), there);
    });
    const told = element("p", box, { className: "small" });
    told.setAttribute("aria-live", "polite");

    async function show() {
      places.set(figure, at);
      set.forEach((tell, c) => tell(at[c]));
      told.textContent = play.said.map((s) => s.states[key(s.by, at)] ?? "").join(" ").trim();
      if (busy) return;  // whoever draws goes on until the latest place is drawn
      busy = true;
      while (drawn !== at) {
        drawn = at;
        for (const s of play.shown) {
          const change = JSON.parse(JSON.stringify(s.states[key(s.by, drawn)]));
          await Plotly.restyle(canvas, change, s.traces);
        }
      }
      busy = false;
      figure.dataset.play = at.join(",");
    }

    canvas.removeAllListeners?.("plotly_click");
    if (play.tap) {
      canvas.on("plotly_click", ({ points }) => {
        const texts = points.filter((p) => p.curveNumber === play.tap.trace).map((p) => p.text);
        const v = play.controls[play.tap.control].values.indexOf(texts[0]);
        const to = at.map((old, i) => (i === play.tap.control ? v : old));
        if (v < 0 || !exists(play, to)) return;
        choose(play.tap.control)(v === at[play.tap.control] ? 0 : v);  // a second tap undoes it
      });
    }
    await show();
  };
})();
