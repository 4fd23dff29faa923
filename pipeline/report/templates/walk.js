// Graphs that a reader walks: a click on a node, or on a name in the list below the figure, shows
// what the node reads and what reads it. draw.js calls this for figures with layout.meta.walk:
//   nodes  index of the trace of nodes; labels: their names; about: lines of text of each
//   lines  indices of the traces of all edges; up, down: of the two that show a node's own
//   links  [source, target, weight]; start: the node shown at first; unit: of the weights
globalThis.retraceWalk = (() => {
  "use strict";
  const at = new Map();  // figure -> the node that the reader went to, or null for all
  const MOST = 12;  // neighbours in a list, each

  function element(tag, text, parent, className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (className) made.className = className;
    parent.append(made);
    return made;
  }

  function neighbours(walk, i, end) {
    const found = walk.links.filter((link) => link[1 - end] === i);
    return found.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).map((l) => [l[end], l[2]]);
  }

  function list(walk, title, found, parent, go) {
    const box = element("div", "", parent);
    element("p", found.length ? title : `${title}: nothing shown`, box, "quiet small");
    const rows = element("ul", "", box, "plain small");
    for (const [node, weight] of found.slice(0, MOST)) {
      const row = element("li", "", rows);
      const button = element("button", walk.labels[node], row);
      button.type = "button";
      button.addEventListener("click", () => go(node));
      element("span", ` ${weight > 0 ? "+" : "−"}${Math.abs(weight).toPrecision(2)} ${walk.unit}`, row, "quiet");
      if (walk.about[node][0]) element("div", walk.about[node][0], row, "quiet");
    }
    if (found.length > MOST) element("li", `and ${found.length - MOST} more`, rows, "quiet");
  }

  function panel(figure, walk, i, go) {
    figure.querySelector(".retrace-walk")?.remove();
    const box = element("div", "", figure, "retrace-walk");
    box.setAttribute("aria-live", "polite");
    const head = element("p", "", box);
    element("b", i === null ? "All nodes" : walk.labels[i], head);
    if (i === null) {
      element("span", ": click one, and walk on through its neighbours", head);
      return;
    }
    for (const line of walk.about[i]) if (line) element("span", ` · ${line}`, head);
    head.append(" ");
    const all = element("button", "show all", head);
    all.type = "button";
    all.addEventListener("click", () => go(null));
    const columns = element("div", "", box, "retrace-walk-columns");
    list(walk, "reads", neighbours(walk, i, 0), columns, go);
    list(walk, "is read by", neighbours(walk, i, 1), columns, go);
  }

  // its own links as two traces, by sign
  function own(canvas, walk, i) {
    const { x, y } = canvas.data[walk.nodes];
    const lines = { up: { x: [], y: [] }, down: { x: [], y: [] } };
    for (const [s, t, weight] of walk.links) {
      if (s !== i && t !== i) continue;
      const line = lines[weight > 0 ? "up" : "down"];
      line.x.push(x[s], x[t], null);
      line.y.push(y[s], y[t], null);
    }
    return lines;
  }

  async function show(figure, canvas, walk, i) {
    const near = new Set([i]);
    for (const [s, t] of walk.links) if (s === i || t === i) near.add(s).add(t);
    const clear = walk.labels.map((_, n) => (i === null || near.has(n) ? 1 : 0.15));
    const { up, down } = own(canvas, walk, i);
    await Plotly.restyle(canvas, { "marker.opacity": [clear] }, [walk.nodes]);
    await Plotly.restyle(canvas, { opacity: i === null ? 1 : 0.12 }, walk.lines);
    await Plotly.restyle(canvas, { x: [up.x, down.x], y: [up.y, down.y] }, [walk.up, walk.down]);
    figure.dataset.node = i === null ? "" : walk.labels[i];
  }

  return async function walkable(figure, canvas, walk) {
    const go = async (i) => {
      at.set(figure, i);
      panel(figure, walk, i, go);
      await show(figure, canvas, walk, i);
    };
    canvas.removeAllListeners?.("plotly_click");
    canvas.on("plotly_click", ({ points }) => {
      if (points[0].curveNumber === walk.nodes) go(points[0].pointNumber);
    });
    await go(at.has(figure) ? at.get(figure) : walk.start);
  };
})();
