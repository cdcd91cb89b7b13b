// Elements and text. Whatever comes from the data goes through here and becomes text, never HTML.

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// What an element holds, in place of what it held; gaps in the list are left out.
function fill(element, ...children) {
  const kept = children.flat().filter((child) => child !== null && child !== undefined);
  element.replaceChildren(...kept);
}

const byId = (id) => document.getElementById(id);

function clip(text, longest) {
  const letters = Array.from(text);
  return letters.length <= longest ? text : letters.slice(0, longest - 1).join("") + "…";
}

const signed = (value, digits = 2) => {
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(text) !== 0 ? "−" : "+") + text;
};
const plain = (value) => (value < 0 ? "−" : "") + d3.format(".3~g")(Math.abs(value));
const percent = (share) => d3.format(share < 0.0995 ? ".2~%" : ".0%")(share);
const count = (number, one, many = one + "s") =>
  `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

// What would be invisible, or turn the text around it: controls, joiners, direction marks.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

// A token with its white space made visible.
function visible(text, spaces = true) {
  const shown = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(UNSEEN, "�");
  return (spaces ? shown.replaceAll(" ", "␣") : shown) || "∅";
}

// One of several, as a row of buttons. `options`: [value, label].
function segmented(label, options, current, choose) {
  return h(
    "div", { class: "segmented", role: "group", "aria-label": label },
    options.map(([value, text]) =>
      h("button", {
        type: "button", "aria-pressed": String(value === current), onclick: () => choose(value),
        "data-key": `${label}/${text}`,
      }, text)),
  );
}

const tip = {
  show(event, lines) {
    const box = byId("tip");
    box.replaceChildren(...lines.map((line) => h("div", {}, line)));
    box.hidden = false;
    const { offsetWidth, offsetHeight } = box;
    const below = event.clientY + 18;
    const x = Math.min(event.clientX + 14, window.innerWidth - offsetWidth - 8);
    const y = below + offsetHeight > window.innerHeight ? below - offsetHeight - 28 : below;
    box.style.transform = `translate(${Math.max(8, x)}px, ${y}px)`;
  },
  hide() { byId("tip").hidden = true; },
};
