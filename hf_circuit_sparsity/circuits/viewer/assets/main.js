// Puts the page together and reacts.

function select(selection) {
  const same = selection && state.selected
    && ["node", "head", "link", "group", "token", "at"].every((kind) => selection[kind] === state.selected[kind]);
  if (same && state.dim) return;
  state.selected = selection;
  state.dim = true;
  tip.hide();
  graph.update();
  details.update();
  url.save();
  if (selection) bringDetailsIntoView();
}

// What follows from the state besides the graph and the sliders.
function refresh() {
  keepingFocus(byId("example"), showExample);
  if (state.view === "tokens") drawGraph();
  details.update();
  url.save();
}

// The graph anew, with what is said of it.
function drawGraph() {
  keepingFocus(byId("view"), showView);
  graph.draw();
  showLegend();
  setThreshold(Math.round(state.threshold * 100));
}

// Who pressed a button that is drawn anew is still on it.
function keepingFocus(host, draw) {
  const held = host.contains(document.activeElement) && document.activeElement.dataset.key;
  draw();
  if (held) host.querySelector(`[data-key="${CSS.escape(held)}"]`)?.focus({ preventScroll: true });
}

// The panel is below the graph: show at least where it begins.
function bringDetailsIntoView() {
  const { top } = byId("details").getBoundingClientRect();
  const wanted = 0.62 * window.innerHeight;
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (top > 0.75 * window.innerHeight)
    window.scrollBy({ top: top - wanted, behavior: still ? "auto" : "smooth" });
}

function setThreshold(percentage) {
  state.threshold = percentage / 100;
  byId("strength").value = percentage;
  const { shown, all } = graph.update();
  const least = (state.threshold * strongestWeight).toFixed(2);
  byId("strength-value").textContent = `from ${least}: ${shown} of ${all} lines`;
  url.save();
}

function setSize(size) {
  state.size = size;
  const place = sliderSizes.indexOf(size);
  byId("size").value = place;
  byId("size-value").textContent = `best ${size} of ${measured.length}: loss ${lossAt(size).toFixed(3)}`;
  byId("size").setAttribute("aria-valuetext", byId("size-value").textContent);
  setThreshold(Math.round(state.threshold * 100));
  curveView.update();
}

const themes = (() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const current = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");

  function label() {
    const other = current() === "dark" ? "light" : "dark";
    byId("theme").textContent = other === "dark" ? "☾ Dark" : "☀ Light";
    byId("theme").setAttribute("aria-label", `Switch to ${other} colours`);
  }

  function start() {
    dark.addEventListener("change", label);
    byId("theme").addEventListener("click", () => {
      root.dataset.theme = current() === "dark" ? "light" : "dark";
      label();
      url.save();
    });
    label();
  }

  return { start, label };
})();

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = event.target.closest?.("input, select, textarea");
  const inGraph = event.target.closest?.("#graph");
  if (event.key === "Escape") {
    tip.hide();
    select(null);
  } else if (typing) {
    return;
  } else if (event.key.startsWith("Arrow") && (inGraph || event.target === document.body)) {
    // From the page's body, up and down scroll it as ever.
    if (!inGraph && ["ArrowUp", "ArrowDown"].includes(event.key)) return;
    event.preventDefault();
    graph.moveFocus(event.key);
  } else if (event.key === "+" || event.key === "=") graph.zoomBy(1.3);
  else if (event.key === "-") graph.zoomBy(1 / 1.3);
  else if (event.key === "0") graph.zoomFit();
}

function mostTelling() {
  const inner = measured.filter((node) => !["act_in", "resid_delta"].includes(node.kind));
  const among = inner.length ? inner : measured;
  return among[d3.maxIndex(among, (node) => node.effect)];
}

function start() {
  url.read();
  themes.start();
  showTitle();
  showExample();
  showLosses();
  showChecks();
  const size = byId("size");
  size.max = sliderSizes.length - 1;
  showView();
  graph.draw();
  showLegend();
  curveView.draw();
  channels.draw();
  details.update();
  notes.update();
  setSize(state.size);
  search.update();
  showWords();
  size.addEventListener("input", () => setSize(sliderSizes[Number(size.value)]));
  byId("strength").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
  byId("zoom-in").addEventListener("click", () => graph.zoomBy(1.3));
  byId("zoom-out").addEventListener("click", () => graph.zoomBy(1 / 1.3));
  byId("zoom-fit").addEventListener("click", graph.zoomFit);
  byId("save-picture").addEventListener("click", downloads.picture);
  byId("save-pixels").addEventListener("click", downloads.pixels);
  byId("save-data").addEventListener("click", downloads.data);
  byId("search").addEventListener("input", (event) => {
    state.search = event.target.value;
    search.update();
    url.save();
  });
  // Another address of this page, typed or followed; our own changes do not come here.
  window.addEventListener("hashchange", () => {
    url.read();
    themes.label();
    showExample();
    drawGraph();
    details.update();
    channels.draw();
    notes.update();
    setSize(state.size);
    search.update();
  });
  document.addEventListener("keydown", onKey);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar comes and goes
    width = window.innerWidth;
    graph.draw();
    showLegend();
    curveView.draw();
  });
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start();
