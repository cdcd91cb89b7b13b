// What a reader makes of the circuit: pinned boxes, their names and groups; and finding one.

const GROUP_COLOURS = 6;
const groupNames = () => [...new Set([...state.pins.values()].map(({ group }) => group).filter(Boolean))];
const inGroup = (name) => nodes.filter((node) => state.pins.get(node)?.group === name);
const groupClass = (node) => {
  const place = groupNames().indexOf(state.pins.get(node)?.group);
  return place < 0 ? "" : `group-${place % GROUP_COLOURS}`;
};

const notes = (() => {
  const host = byId("pins");

  function pin(node, on) {
    if (on) state.pins.set(node, { name: "", group: "" });
    else state.pins.delete(node);
    changed();
  }

  function changed() {
    if (state.selected?.group && !groupNames().includes(state.selected.group)) state.selected = null;
    graph.draw();
    details.update();
    update();
    url.save();
  }

  function button(node) {
    const pinned = state.pins.has(node);
    return h("button", { type: "button", class: "quiet", "aria-pressed": String(pinned), "data-key": "pin",
      onclick: () => pin(node, !pinned) }, pinned ? "Unpin" : "Pin");
  }

  function field(node, what, label) {
    const entry = state.pins.get(node);
    return h("input", { type: "text", maxlength: 60, placeholder: label,
      "aria-label": `${label} of ${nodeName(node)}`, value: entry[what],
      list: what === "group" ? "group-names" : undefined,
      onchange: (event) => { entry[what] = event.target.value.trim().slice(0, 60); changed(); } });
  }

  function update() {
    if (!state.pins.size) {
      fill(host, h("p", { class: "note" }, "Pin a box to name it or to group it with others. The address "
        + "of this page holds all that you choose, to be shared."));
      return;
    }
    const groups = groupNames();
    fill(host,
      h("h3", {}, "Pinned"),
      h("datalist", { id: "group-names" }, groups.map((name) => h("option", { value: name }))),
      groups.length ? h("div", { class: "groups" }, groups.map((name, i) =>
        h("button", { type: "button", class: "quiet", onclick: () => select({ group: name }) },
          h("i", { class: `dot-mark group-${i % GROUP_COLOURS}` }), clip(visible(name, false), 40)))) : null,
      h("div", { class: "pinned" }, [...state.pins.keys()].map((node) => h("div", { class: "pin" },
        h("button", { type: "button", class: "quiet", onclick: () => select({ node }) },
          h("i", { class: `dot-mark ${groupClass(node)}` }), `${nodeName(node)}, ${nodePlace(node)}`),
        node.effect === undefined ? h("span") : h("span", { class: "value" }, signed(node.effect, 3)),
        field(node, "name", "Name"), field(node, "group", "Group"),
        h("button", { type: "button", class: "quiet", "aria-label": `Unpin ${nodeName(node)}`,
          onclick: () => pin(node, false) }, "✕")))));
  }

  return { button, update };
})();

// Boxes of which every word is in the name, the place or the note.
const search = (() => {
  function found() {
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    return nodes.filter((node) => {
      const all = `${nodeName(node)} ${nodePlace(node)} ${nodeKey(node)} ${node.note ?? ""}`.toLowerCase();
      return words.every((word) => all.includes(word));
    });
  }

  function update() {
    const list = found();
    byId("search").value = state.search;
    graph.mark(new Set(list));
    fill(byId("found"), !state.search.trim() ? null : h("p", { class: "note" }, count(list.length, "box", "boxes"), " ",
      list.slice(0, 12).map((node) => h("button", { type: "button", class: "quiet", onclick: () => {
        select({ node });
        graph.reveal({ node });
      } }, `${nodeName(node)}, ${nodePlace(node)}`))));
  }

  return { update };
})();
