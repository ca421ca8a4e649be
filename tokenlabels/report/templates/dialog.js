// The large view of one image.

const large = document.getElementById("large");
const REASONS = {
  confident: "confidence",
  uncertain: "uncertainty",
  disagrees: "disagreement",
  objects: "objects",
  random: "no reason: random",
};
let opened = null;

function classButton(id) {
  const made = element("button", { type: "button", className: "link" }, nameOf(id));
  made.addEventListener("click", () => {
    large.close();
    showOnly({ class: String(id) });
  });
  return made;
}

function factsOf(item) {
  const facts = [
    ["teacher", nameOf(item.predicted)],
    ["data set", item.label === null ? "no class" : nameOf(item.label)],
    ["confidence", inShare(item.top1)],
    ["entropy", inShare(item.entropy)],
    ["own class", item.own_mass === null ? "not measured" : inShare(item.own_mass)],
    ["tail", inShare(item.tail)],
    ["objects", String(item.num_objects)],
    ["distinct classes", String(item.num_distinct)],
    ["shard", item.shard],
    ["chosen for", item.reasons.map((reason) => REASONS[reason]).join(", ")],
  ];
  return facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

function leadingRow(known) {
  return element(
    "tr",
    {},
    element("td", {}, swatch(known.colour), classButton(known.class_id)),
    element("td", { className: "figure" }, inShare(known.share_of_cells)),
    element("td", { className: "figure" }, inShare(known.mean_probability)),
  );
}

function fillLarge(item) {
  const map = mapOf(item);
  opened = item;
  document.getElementById("large-title").textContent = item.key;
  document.getElementById("large-facts").replaceChildren(...factsOf(item));
  document.getElementById("leading-rows").replaceChildren(...item.leading.map(leadingRow));
  document.getElementById("cell-rows").replaceChildren();
  const stack = stackOf(item, {
    look: (cell) => {
      if (!cell) return; // the last one stays
      document.getElementById("cell-title").textContent = titleOf(cell);
      document.getElementById("cell-rows").replaceChildren(...rowsOf(map, cell, classButton));
    },
    say: (words) => (document.getElementById("large-said").textContent = words),
    enter: () => {},
    lines: true,
  });
  document.getElementById("large-frame").replaceChildren(stack);
  stack.showFirst?.();
  const items = chosenItems();
  const place = items.indexOf(item);
  const [previous, next, close] = ["previous", "next", "close"].map((id) => document.getElementById(id));
  const focused = document.activeElement;
  previous.disabled = place < 1;
  next.disabled = place < 0 || place === items.length - 1;
  // a button that is switched off would lose the focus to the page
  if (focused?.disabled) [previous, next, close].find((button) => !button.disabled).focus();
}

function openLarge(item) {
  hideCard();
  fillLarge(item);
  if (!large.open) large.showModal();
  large.scrollTop = 0;
}

function step(by) {
  const items = chosenItems();
  const next = items[items.indexOf(opened) + by];
  if (next) openLarge(next);
}

document.getElementById("previous").addEventListener("click", () => step(-1));
document.getElementById("next").addEventListener("click", () => step(1));
document.getElementById("close").addEventListener("click", () => large.close());
document.getElementById("large-on").addEventListener("input", ({ target }) => {
  large.classList.toggle("maps-off", !target.checked);
});
large.addEventListener("click", (event) => {
  const { left, right, top, bottom } = large.getBoundingClientRect();
  const isBeside = event.clientX < left || event.clientX > right || event.clientY < top || event.clientY > bottom;
  if (event.target === large && isBeside) large.close();
});
