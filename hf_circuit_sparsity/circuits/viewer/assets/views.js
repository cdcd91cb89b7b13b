// The view in the page's address, and what can be taken away: the picture and the data.

const url = (() => {
  const byKey = new Map(nodes.map((node) => [nodeKey(node), node]));
  const linkKey = (link) => `${nodeKey(link.source)}>${nodeKey(link.target)}`;
  const among = (value, options, none) => (options.includes(value) ? value : none);
  const whole = (value, most, none) => {
    const number = Number(value ?? NaN);
    return Number.isInteger(number) && number >= 0 && number <= most ? number : none;
  };

  function save() {
    const { selected } = state;
    const said = {
      view: state.view === "nodes" ? "" : state.view,
      token: selected?.at ?? "",
      at: selected?.node ? nodeKey(selected.node)
        : selected?.head ? `head ${selected.head.layer}.${selected.head.head}`
          : selected?.link ? linkKey(selected.link)
            : selected?.group ? `group ${selected.group}`
              : selected?.token !== undefined ? `token ${selected.token}` : "none",
      dim: state.dim ? "1" : "",
      strength: state.threshold ? Math.round(100 * state.threshold) : "",
      size: state.size === measured.length ? "" : state.size,
      pair: state.pair || "", side: state.side || "", query: state.query ?? "",
      sample: state.sample === "task" ? "" : state.sample,
      run: state.run === "circuit" ? "" : state.run,
      channel: channels.chosen(), search: state.search, theme: document.documentElement.dataset.theme ?? "",
    };
    const params = new URLSearchParams(Object.entries(said).filter(([, value]) => value !== ""));
    for (const [node, { name, group }] of state.pins)
      params.append("pin", JSON.stringify([nodeKey(node), name, group]));
    // Refused in frames without an address, and where it changes too often.
    try { history.replaceState(null, "", `#${params}`); } catch { /* The view is only not shared. */ }
  }

  function selection(at, token) {
    if (byKey.has(at)) return { node: byKey.get(at), at: token ?? undefined };
    const [kind, name] = at.split(/ (.*)/s);
    const place = kind === "token" ? whole(name, PAIR_TOKENS - 1, null) : null;
    if (place !== null) return { token: place };
    if (kind === "group") return groupNames().includes(name) ? { group: name } : null;
    const head = heads.find((other) => at === `head ${other.layer}.${other.head}`);
    if (head) return { head };
    const link = links.find((other) => at === linkKey(other));
    return link ? { link } : null;
  }

  // Anybody's address: what it names and is not here is left out.
  function read() {
    const params = new URLSearchParams(location.hash.slice(1));
    state.pins.clear();
    for (const text of params.getAll("pin").slice(0, nodes.length)) {
      try {
        const [key, name, group] = JSON.parse(text);
        if (byKey.has(key))
          state.pins.set(byKey.get(key), { name: String(name).slice(0, 60), group: String(group).slice(0, 60) });
      } catch { /* No pin. */ }
    }
    state.view = among(params.get("view"), ["tokens"], "nodes");
    state.threshold = whole(params.get("strength"), 100, 0) / 100;
    state.size = among(whole(params.get("size"), measured.length, null), sliderSizes, measured.length);
    state.pair = whole(params.get("pair"), data.pairs.length - 1, 0);
    state.side = whole(params.get("side"), 1, 0);
    state.query = whole(params.get("query"), PAIR_TOKENS - 1, null);
    state.sample = among(params.get("sample"), ["text"], "task");
    state.run = among(params.get("run"), ["model"], "circuit");
    channels.choose(whole(params.get("channel"), Infinity, null));
    state.search = (params.get("search") ?? "").slice(0, 100);
    const theme = among(params.get("theme"), ["light", "dark"], null);
    if (theme) document.documentElement.dataset.theme = theme;
    const at = params.get("at");
    state.selected = at === null ? { node: mostTelling() } : selection(at, whole(params.get("token"), PAIR_TOKENS - 1, null));
    state.dim = params.get("dim") === "1" && state.selected !== null;
  }

  return { save, read };
})();

const downloads = (() => {
  const SHOWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "opacity",
    "font-family", "font-size", "font-weight", "paint-order", "stroke-linejoin", "display", "text-anchor"];

  // What no XML may hold; a token or a name may.
  const NO_XML = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g;

  function give(content, type, ending) {
    const address = URL.createObjectURL(new Blob([content], { type }));
    const name = data.task.replace(/[^\w-]+/g, "_").slice(0, 60) || "circuit";
    h("a", { href: address, download: `${name}.${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  // The graph as it is seen, with its styles in it and on the page's ground.
  function drawn() {
    const shown = byId("graph").querySelector("svg");
    const copy = shown.cloneNode(true);
    const copies = copy.querySelectorAll("*");
    shown.querySelectorAll("*").forEach((element, i) => {
      const style = getComputedStyle(element);
      copies[i].removeAttribute("style");
      for (const name of SHOWN) copies[i].setAttribute(name, style.getPropertyValue(name));
    });
    copy.querySelectorAll(".link-catch").forEach((element) => element.remove());
    const [width, height] = ["width", "height"].map((side) => Math.ceil(shown.getBoundingClientRect()[side]));
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    copy.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const ground = copy.ownerDocument.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of [["width", "100%"], ["height", "100%"],
      ["fill", getComputedStyle(document.querySelector(".graph-card")).backgroundColor]])
      ground.setAttribute(name, value);
    copy.prepend(ground);
    const text = new XMLSerializer().serializeToString(copy);
    return { width, height, text: text.replace(NO_XML, "\ufffd").toWellFormed() };
  }

  const picture = () => give(drawn().text, "image/svg+xml", "svg");

  // The same in pixels, twice as many as on the page, for a paper or a slide.
  async function pixels() {
    const { width, height, text } = drawn();
    const image = new Image();
    // The page's policy lets no other image in than what is in its address.
    image.src = `data:image/svg+xml,${encodeURIComponent(text)}`;
    await image.decode();
    const canvas = h("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => give(blob, "image/png", "png"));
  }

  return { picture, pixels, data: () => give(byId("data").textContent, "application/json", "json") };
})();
