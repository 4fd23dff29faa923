// A metric's name opens its definition beside it; links and prints open what is folded.
(() => {
  "use strict";
  const box = document.getElementById("definition");
  const meaning = (link) => document.getElementById(decodeURIComponent(link.hash.slice(1)));

  // the folds around an element, so that a link or a print can reach it
  function unfold(element) {
    for (let e = element; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
  }

  function listed(link) {
    const all = document.createElement("a");
    all.href = `../catalogue.html#${link.dataset.listed}`;
    all.textContent = "in the catalogue";
    return all;
  }

  function show(link, text) {
    const name = document.createElement("p"), said = document.createElement("p");
    name.className = "mono small";
    name.textContent = link.dataset.name ?? text.previousElementSibling?.textContent ?? "";
    said.textContent = text.textContent;
    const all = document.createElement("a");
    all.href = link.hash;
    all.textContent = "among this report’s metrics";
    all.addEventListener("click", () => { box.hidePopover(); unfold(text); });
    box.replaceChildren(name, said, all, ...(link.dataset.listed ? [listed(link)] : []));
    box.showPopover();
    const at = link.getBoundingClientRect(), size = box.getBoundingClientRect();
    if (innerWidth < 520) return;  // there it is a sheet at the bottom, see style.css
    box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    const below = at.bottom + 6, above = at.top - size.height - 6;
    box.style.top = `${below + size.height < innerHeight || above < 8 ? below : above}px`;
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a.metric");
    const text = link && meaning(link);
    if (!text || !box?.showPopover || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(link, text);
  });
  document.addEventListener("pointerover", (event) => {
    const link = event.target.closest?.("a.metric:not([title])");
    const text = link && meaning(link);
    if (text) link.title = text.textContent;
  });

  const follow = () => unfold(document.getElementById(decodeURIComponent(location.hash.slice(1))));
  addEventListener("hashchange", follow);
  follow();
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll(".claims details:not([open]), .fold:not([open])")];
    folded.forEach((d) => { d.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));
})();
