// Draws every .retrace-figure of a page with plotly.js, in the page's colours.
(() => {
  "use strict";
  // roles of colour in theme.py -> what stands for them on dark ground
  const DARK = { "#1b1f24": "#e6e8eb", "#d9dde3": "#363c44", "#fefefe": "#1d2126" };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = 520;
  const MANY = 24;  // names on an axis, of which some stand for all
  const SMALL = 10;  // pixels of a name that is small and can still be read
  const ROOMY = 720, PANEL = 160;  // pixels of a figure, and a panel, that a phone has no room for
  const thinned = new Map();  // canvas -> settings of its axes before `uncrowded` changed them
  const types = new Map();  // figure -> types of its axes, which plotly would guess anew from other data
  const chosen = new Map();  // figure -> the place that the reader gave each control

  const figures = () => [...document.querySelectorAll(".retrace-figure")];

  function read(figure, onDark) {
    let text = figure.querySelector("script.retrace-plot").textContent;
    if (onDark) for (const [from, to] of Object.entries(DARK)) text = text.replaceAll(from, to);
    return JSON.parse(text);
  }

  function canvas(figure) {
    let box = figure.querySelector(".retrace-canvas");
    if (!box) {
      box = document.createElement("div");
      box.className = "retrace-canvas";
      figure.append(box);
    }
    return box;
  }

  // plotly's own menus and sliders overlap legends on a phone: they become controls above the figure
  function controls(figure, all) {
    figure.querySelectorAll(".retrace-choice").forEach((old) => old.remove());
    all.forEach((control, c) => {
      const label = document.createElement("label");
      label.className = "retrace-choice";
      const at = chosen.get(figure)?.[c] ?? control.active ?? 0;
      const choose = (i) => {
        chosen.set(figure, { ...chosen.get(figure), [c]: i });
        return apply(figure, control, i);
      };
      label.append(...(control.steps ? slider(control, at, choose) : list(control, at, choose)));
      figure.prepend(label);
    });
  }

  function list(menu, at, choose) {
    const select = document.createElement("select");
    menu.buttons.forEach((b) => select.add(new Option(b.label)));
    select.selectedIndex = at;
    select.addEventListener("change", () => choose(select.selectedIndex));
    return ["show ", select];
  }

  function slider(control, at, choose) {
    const range = document.createElement("input");
    Object.assign(range, { type: "range", min: 0, max: control.steps.length - 1, value: at });
    const told = document.createElement("output");
    const tell = () => {
      range.ariaValueText = told.textContent = control.steps[range.value].label;
    };
    tell();
    let shown = at, busy = false;
    range.addEventListener("input", async () => {
      tell();
      if (busy) return;  // a drag asks faster than plotly draws: only its latest place counts
      busy = true;
      while (shown !== Number(range.value)) await choose(shown = Number(range.value));
      busy = false;
    });
    return [control.currentvalue?.prefix ?? "", range, told];
  }

  async function apply(figure, control, i) {
    const { method, args } = (control.steps ?? control.buttons)[i];
    const box = canvas(figure);
    if (thinned.has(box)) await Plotly.relayout(box, thinned.get(box));
    thinned.delete(box);
    const [traces, layout] = JSON.parse(JSON.stringify(args));
    await Plotly[method](box, traces, { ...types.get(figure), ...layout });
    await uncrowded(box);
  }

  // room for a legend that wraps: plotly takes it from the plot
  function height(layout, data, width) {
    const named = data.filter((t) => t.name && t.showlegend !== false && t.visible !== false);
    const base = layout.height ?? 440;
    if (width < narrow && layout.meta?.play) return Math.min(base, square(layout, width) + 110);
    if (named.length < 2 || layout.showlegend === false) {
      const axes = Object.keys(layout).filter((key) => /^yaxis/.test(key));
      const panels = new Set(axes.map((key) => layout[key].domain?.[0] ?? 0)).size;  // one below the other
      return width < narrow ? Math.min(base, Math.max(380, 230 * panels)) : base;
    }
    const chars = named.reduce((sum, t) => sum + 8 + String(t.name).length, 0);
    const widest = Math.max(...named.map((t) => 8 + String(t.name).length)) * 7.5;
    const columns = Math.max(1, Math.floor((width - 70) / widest));
    const rows = chars * 7.5 < width - 70 ? 1 : Math.ceil(named.length / columns);
    const room = Math.max(base, 300 + 20 * rows);
    return width < narrow ? Math.min(room, square(layout, width) + 100 + 20 * rows) : room;
  }

  // how high a plot of so many pixels is where its panels are square; without such panels no bound
  function square(layout, width) {
    const span = (axis) => (axis?.domain ?? [0, 1]).reduce((from, to) => to - from);
    const heights = Object.keys(layout).filter((key) => layout[key]?.scaleanchor)
      .map((key) => (width - 60) * span(layout[`xaxis${key.slice(5)}`]) / span(layout[key]));
    return heights.length ? Math.max(...heights) : Infinity;
  }

  // panels side by side: titles each within its own panel, smaller ones on a phone
  function fitted(layout, pixels, small) {
    let least = 1;
    for (const key of Object.keys(layout)) {
      if (!/^xaxis/.test(key)) continue;
      const [from, to] = layout[key].domain ?? [0, 1];
      least = Math.min(least, to - from);
      if (small && to - from < 0.6 && layout[key].title) layout[key].title.font = { size: 10 };
      broken(layout[key].title, pixels * (to - from), small ? 7 : 8);
    }
    if (least >= 0.6) return;
    for (const note of layout.annotations ?? []) {
      if (note.showarrow !== false || note.yref !== "paper") continue;
      if (small) note.font = { ...note.font, size: 10 };
      const alone = note.x === 0.5 && note.y === 0;  // one title below all panels
      broken(note, alone ? pixels : pixels * least);
    }
  }

  // a title longer than its axis breaks at a space near its middle
  function broken(title, pixels, letter = 7) {
    const text = title?.text ?? "";
    if (text.length * letter < pixels || text.includes("<")) return;
    const middle = text.length / 2;
    const spaces = [...text.matchAll(/ /g)].map((m) => m.index);
    const at = spaces.sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle))[0];
    if (at) title.text = `${text.slice(0, at)}<br>${text.slice(at + 1)}`;
  }

  // names on an x axis that lean: upright in several lines, smaller, in two rows, or a few of many
  function named(key, axis) {
    const names = axis._categories.map(String), slot = axis._length / names.length;
    const ink = document.createElement("canvas").getContext("2d");
    const wide = (text) => ink.measureText(text).width;
    const set = (size, slots = 1) => {
      ink.font = `${size}px ${axis.tickfont.family}`;
      const lines = names.map((name) => wrapped(name, (text) => wide(text) <= slots * slot - 4));
      return { size, lines, step: Math.ceil((Math.max(...lines.flat().map(wide)) + 4) / slot) };
    };
    const each = names.length < MANY, tried = [set(axis.tickfont.size), set(SMALL)];
    const { size, lines, step } = tried.find((s) => s.step === 1) ?? (each ? set(SMALL, 2) : tried[0]);
    const two = each && step > 1;
    if (two && step > 2) return {};  // each of a few names counts: they lean
    if (two) {  // every second one stands below its neighbours
      const rows = Math.max(...lines.filter((_, i) => i % 2 === 0).map((l) => l.length));
      lines.forEach((l, i) => { if (i % 2) l.unshift(...Array(rows).fill("\u00a0")); });
    }
    const shown = names.map((_, i) => i).filter((i) => two || i % step === 0);
    return {
      [`${key}.tickmode`]: "array", [`${key}.tickvals`]: shown, [`${key}.tickfont.size`]: size,
      [`${key}.ticktext`]: shown.map((i) => lines[i].join("<br>")), [`${key}.tickangle`]: 0,
    };
  }

  // the lines of a name, broken at spaces where a longer line does not fit
  function wrapped(name, fits) {
    const lines = [];
    for (const word of name.split(/<br>| /)) {
      const longer = `${lines.at(-1) ?? ""} ${word}`.trim();
      if (lines.length && fits(longer)) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines;
  }

  // tick labels that touch or lean: fewer of them, upright
  async function uncrowded(box, rounds = 4) {
    const change = {};
    for (const [key, axis] of Object.entries(box._fullLayout)) {
      if (!/^[xy]axis\d*$/.test(key) || axis.tickmode === "array") continue;
      const labels = [...box.querySelectorAll(`.${axis._id}tick text`)];
      const leans = labels.some((e) => /rotate\(-?[1-9]/.test(e.getAttribute("transform")));
      if (key[0] === "x" && axis.type === "category" && leans) Object.assign(change, named(key, axis));
      const [from, to] = key[0] === "x" ? ["left", "right"] : ["top", "bottom"];
      const places = labels.map((e) => e.getBoundingClientRect()).sort((a, b) => a[from] - b[from]);
      if (!leans && !places.some((p, i) => i && p[from] < places[i - 1][to] + 3)) continue;
      if (axis.type !== "log" && axis.type !== "linear") continue;
      const widest = Math.max(...places.map((p) => (key[0] === "x" ? Math.max(p.width, p.height) : p.height)));
      const least = Math.abs(axis.range[1] - axis.range[0]) * (widest + 6) / axis._length;
      const ten = 10 ** Math.floor(Math.log10(least));
      const round = [1, 2, 5, 10].map((n) => n * ten).find((step) => step >= least);
      // without their 2 and 5 the labels of decades are shorter: one step at a time
      change[`${key}.dtick`] = axis.type !== "log" ? round : Number(axis.dtick) + 1 || 1;
      const [low, high] = [...axis.range].sort((a, b) => a - b);
      const two = Math.floor(high / round) > Math.ceil(low / round);  // a lone label tells no scale
      change[`${key}.tick0`] = two || axis.type === "log" ? 0 : Math.ceil(low / round * 2) * round / 2;
      change[`${key}.tickangle`] = 0;
      change[`${key}.tickmode`] = "linear";  // named, so that it is taken back with the rest
    }
    if (!Object.keys(change).length) return;
    const before = Object.keys(change).map((path) => {
      return [path, path.split(".").reduce((at, key) => at?.[key], box.layout) ?? null];
    });
    thinned.set(box, { ...Object.fromEntries(before), ...thinned.get(box) });
    await Plotly.relayout(box, change);
    if (rounds > 1) await uncrowded(box, rounds - 1);
  }

  // plotly writes the 2 and 5 of a log axis smaller than its decades, and higher: one size and line;
  // and 20 as 2x10, as if an exponent were missing
  function evenDigits(box) {
    for (const [key, axis] of Object.entries(box._fullLayout)) {
      if (!/^[xy]axis\d*$/.test(key) || axis.type !== "log") continue;
      const texts = [...box.querySelectorAll(`.${axis._id}tick text`)];
      const lowest = Math.max(...texts.map((text) => Number(text.getAttribute("y"))));
      for (const text of texts) {
        text.style.fontSize = `${axis.tickfont.size}px`;
        const first = text.firstChild;
        if (/^\dx10$/.test(text.textContent)) text.textContent = `${text.textContent[0]}0`;
        else if (first?.nodeType === 3) first.nodeValue = first.nodeValue.replace("x10", "×10");
        if (key[0] === "x" && axis.side !== "top") text.setAttribute("y", lowest);
      }
    }
  }

  // of a colour '#rrggbb' or 'rgb(r, g, b)', WCAG 2
  function luminance(colour) {
    const parts = colour[0] === "#" ? colour.slice(1).match(/../g).map((c) => parseInt(c, 16))
      : colour.match(/[\d.]+/g).map(Number);
    const [r, g, b] = parts.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  // a place from 0 to 1 on a scale of evenly mixed colours
  function shade(scale, at) {
    const i = Math.max(scale.findIndex(([stop]) => stop >= at), 1);
    const [[from, a], [to, b]] = [scale[i - 1], scale[i]];
    const share = (at - from) / (to - from || 1);
    const [low, high] = [a, b].map((c) => c.match(/[0-9a-f]{2}/gi).map((d) => parseInt(d, 16)));
    return `rgb(${low.map((c, k) => c + share * (high[k] - c)).join(",")})`;
  }

  // numbers on a map are black or white, whichever stands out more: plotly writes grey on grey
  function legible(box) {
    for (const label of box.querySelectorAll(".heatmap-label text")) {
      const trace = label.closest(".hm").__data__[0].trace, z = label.__data__.z;
      const { colorscale, cmin = trace.zmin, cmax = trace.zmax } = box._fullLayout[trace.coloraxis] ?? trace;
      if (!colorscale.every(([, colour]) => /^#[0-9a-f]{6}$/i.test(colour))) continue;
      const ground = luminance(shade(colorscale, Math.min(1, Math.max(0, (z - cmin) / (cmax - cmin || 1)))));
      label.style.fill = ground > 0.179 ? "#000000" : "#ffffff";  // where both have a contrast of 4.6
    }
  }

  function retouched(box) {
    evenDigits(box);
    legible(box);
  }

  // whether a phone shows names on an x axis leaning, for want of room
  function leaning(box) {
    return Object.entries(box._fullLayout).some(([key, axis]) => /^xaxis\d*$/.test(key) &&
      axis.type === "category" && [...box.querySelectorAll(`.${axis._id}tick text`)]
        .some((e) => /rotate\(-?[1-9]/.test(e.getAttribute("transform"))));
  }

  // titles of panels, which stand above them
  function panelTitles(box) {
    const notes = box._fullLayout.annotations ?? [];
    const above = (e) => notes[e.dataset.index]?.yref === "paper" && !notes[e.dataset.index].showarrow;
    return [...box.querySelectorAll(".annotation")].filter(above).map((e) => e.querySelector("text"));
  }

  // a legend above panels makes room for titles that a narrow figure has broken in two
  async function lifted(box) {
    const legend = box.querySelector(".legend"), { _size: room, margin, height, legend: { y } = {} } = box._fullLayout;
    if (!legend || !(y >= 1)) return;
    const low = legend.getBoundingClientRect(), places = panelTitles(box).map((e) => e.getBoundingClientRect());
    const over = Math.max(0, ...places.filter((p) => p.top > low.top).map((p) => low.bottom + 2 - p.top));
    if (over) await Plotly.relayout(box, { "legend.y": y + over / room.h, "margin.t": margin.t + over, height: height + over });
  }

  // whether titles or tick labels lie on each other, so that the figure wants more room than a phone has
  function colliding(box) {
    const apart = (list) => {
      const places = list.map((e) => e.getBoundingClientRect()).filter((p) => p.width);
      return places.every((p, i) => places.slice(0, i).every((q) =>
        p.left >= q.right || q.left >= p.right || p.top >= q.bottom - 2 || q.top >= p.bottom - 2));
    };
    const axes = Object.entries(box._fullLayout).filter(([key]) => /^xaxis\d*$/.test(key)).map(([, axis]) => axis);
    const titles = panelTitles(box);
    titles.push(...axes.flatMap((axis) => [...box.querySelectorAll(`.${axis._id}title`)]));
    const left = box.getBoundingClientRect().left;
    const inside = [...box.querySelectorAll('[class^="y"][class$="title"]')].some((e) => {
      const { left: from, right: to } = e.getBoundingClientRect(), middle = (from + to) / 2 - left;
      return axes.some((axis) => middle > axis._offset && middle < axis._offset + axis._length);
    });
    const right = left + box.clientWidth;  // a title above a narrow panel may begin or end beyond it
    const cut = titles.map((e) => e.getBoundingClientRect()).some((p) => p.left < left - 1 || p.right > right + 1);
    return inside || cut || !apart(titles) || axes.some((axis) => !apart([...box.querySelectorAll(`.${axis._id}tick text`)]));
  }

  // a phone shows no scroll bar: that a figure goes on is said above it
  function told(figure) {
    figure.querySelector(".retrace-wide")?.remove();
    if (figure.scrollWidth <= figure.clientWidth + 1) return;
    const note = document.createElement("p");
    note.className = "retrace-wide";
    note.textContent = "goes on to the right →";
    note.style.cssText = "position: sticky; left: 0; width: fit-content; margin: 0; font-size: .8rem; opacity: .75";
    canvas(figure).before(note);
  }

  async function draw(figure, onDark, wanted = 0) {
    const plot = read(figure, onDark);
    const { updatemenus = [], sliders = [], ...rest } = plot.layout;
    plot.layout = rest;
    const stated = Object.entries(rest).filter(([key, axis]) => /^[xy]axis\d*$/.test(key) && axis.type);
    types.set(figure, Object.fromEntries(stated.map(([key, axis]) => [`${key}.type`, axis.type])));
    controls(figure, [...updatemenus, ...sliders]);
    const box = canvas(figure);
    const least = Math.max(plot.layout.meta?.min_width ?? 0, wanted);  // a wider figure scrolls sideways on a phone
    if (least) {
      figure.style.overflowX = "auto";
      figure.tabIndex = 0;  // so that the arrow keys scroll it
      box.style.minWidth = `${least}px`;
    }
    const width = Math.max(figure.clientWidth, least);
    const layout = { ...plot.layout, autosize: true, height: height(plot.layout, plot.data, width) };
    delete layout.width;
    fitted(layout, width - 80, width < narrow);
    if (width < narrow) {
      layout.font = { size: 11, ...layout.font };
      for (const t of plot.data) if (t.type === "bar" && t.texttemplate) t.textangle = -90;
    }
    const name = figure.id.replace(/^figure-/, "") || "figure";
    const config = {
      responsive: true,
      displaylogo: false,
      displayModeBar: width < narrow ? false : "hover",
      // no upload: plotly.js 4 would offer to send the data to its maker's cloud
      modeBarButtonsToRemove: ["sendChartToCloud", "lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
      toImageButtonOptions: { format: "svg", filename: name },
    };
    thinned.delete(box);
    await Plotly.react(box, plot.data, layout, config);
    retouched(box);
    if (!box.dataset.even) box.on("plotly_afterplot", () => retouched(box));
    box.dataset.even = "yes";
    await uncrowded(box);
    if (width < narrow && !plot.layout.meta?.play && (colliding(box) || leaning(box))) {
      const spans = Object.keys(layout).filter((key) => /^xaxis/.test(key)).map((key) => layout[key].domain ?? [0, 1]);
      return draw(figure, onDark, Math.max(ROOMY, ...spans.map(([from, to]) => PANEL / (to - from))));
    }
    await lifted(box);
    for (const [c, control] of [...updatemenus, ...sliders].entries()) {
      const i = chosen.get(figure)?.[c] ?? control.active ?? 0;
      if (i !== (control.active ?? 0)) await apply(figure, control, i);
    }
    if (plot.layout.meta?.play) await retracePlay(figure, box, plot.layout.meta.play);
    if (plot.layout.meta?.walk) await retraceWalk(figure, box, plot.layout.meta.walk);
    figure.querySelector(".retrace-wait")?.remove();
    told(figure);
    figure.dataset.drawn = onDark ? "dark" : "light";
  }

  async function all(onDark) {
    for (const figure of figures()) {
      try {
        await draw(figure, onDark);
      } catch (e) {
        console.error(`figure ${figure.id}: ${e}`);
      }
      await new Promise((next) => setTimeout(next));  // the page stays scrollable meanwhile
    }
    document.documentElement.dataset.figures = "drawn";
  }

  dark.addEventListener("change", () => all(dark.matches));
  addEventListener("resize", () => figures().filter((f) => f.dataset.drawn).forEach(told));  // a phone is turned
  addEventListener("beforeprint", () => figures().forEach((f) => draw(f, false)));
  addEventListener("afterprint", () => all(dark.matches));
  all(dark.matches);
})();
