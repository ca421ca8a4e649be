// The gallery: tiles, and what is chosen of them. What is chosen is kept in the address.

const form = document.getElementById("filters");
const tiles = document.getElementById("tiles");
const said = document.getElementById("said");
const choice = { show: "all", class: "", text: "", sort: "confident", pair: "" };

const SHOWN = {
  all: () => true,
  disagrees: (item) => item.label !== null && item.label !== item.predicted,
  objects: (item) => item.num_objects >= 2,
  confident: (item) => item.reasons.includes("confident"),
  uncertain: (item) => item.reasons.includes("uncertain"),
  random: (item) => item.reasons.includes("random"),
};
const byKey = new Intl.Collator("en", { numeric: true }).compare;
const ORDERS = {
  confident: (item) => -item.top1,
  uncertain: (item) => -item.entropy,
  objects: (item) => -item.num_objects,
  disagreement: (item) => (item.disagreement === null ? Infinity : -item.disagreement),
  key: () => 0,
};
const inShare = (share) => inPercent(1000 * share);
const inNumber = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

function tileOf(item) {
  const stack = stackOf(item, {
    look: (cell, anchor) => (cell ? showCard(mapOf(item), cell, anchor) : hideCard()),
    say: (words) => (said.textContent = words),
    enter: () => openLarge(item),
    lines: false,
  });
  const open = element("button", { type: "button", className: "link", title: item.key }, item.key);
  open.addEventListener("click", () => openLarge(item));
  const predicted = nameOf(item.predicted);
  const colour = mapOf(item).colours.get(item.predicted);
  const lines = [element("p", { className: "verdict", title: predicted }, swatch(colour), predicted)];
  if (SHOWN.disagrees(item)) {
    const label = nameOf(item.label);
    lines.push(element("p", { className: "other", title: label }, `data set: ${label}`));
  }
  const objects = inNumber(item.num_objects, "object", "objects");
  lines.push(element("p", { className: "measured" }, `${inShare(item.top1)} confident, ${objects}`));
  const frame = element("div", { className: "frame" }, stack);
  return element("li", { className: "tile" }, frame, element("h3", {}, open), ...lines);
}

const tileFor = new Map();

function wanted(item) {
  const [label, predicted] = choice.pair.split("-").map(Number);
  const words = [item.key, ...item.shows.map(nameOf)].join("\n").toLowerCase();
  return (
    SHOWN[choice.show](item) &&
    (choice.class === "" || item.shows.includes(Number(choice.class))) &&
    (choice.pair === "" || (item.label === label && item.predicted === predicted)) &&
    words.includes(choice.text.trim().toLowerCase())
  );
}

/** The items that are shown, in their order. */
function chosenItems() {
  const value = ORDERS[choice.sort];
  const compare = (a, b) => (value(a) === value(b) ? byKey(a.key, b.key) : value(a) - value(b));
  return DATA.items.filter(wanted).sort(compare);
}

function update() {
  const items = chosenItems();
  hideCard();
  tiles.replaceChildren(
    ...items.map((item) => {
      if (!tileFor.has(item)) tileFor.set(item, tileOf(item));
      return tileFor.get(item);
    }),
  );
  for (const name of ["show", "class", "text", "sort"]) form.elements[name].value = choice[name];
  const [label, predicted] = choice.pair.split("-");
  const pair = document.getElementById("pair");
  pair.hidden = choice.pair === "";
  pair.textContent = pair.hidden ? "" : `\u00d7 ${nameOf(label)}, predicted as ${nameOf(predicted)}`;
  document.getElementById("status").textContent = `${items.length} of ${inNumber(DATA.items.length, "image", "images")}`;
  document.getElementById("clear").hidden = items.length === DATA.items.length;
  document.getElementById("empty").hidden = items.length > 0;
}

const initial = { ...choice };

/** What is chosen, as the address keeps it; empty where nothing is. */
function address() {
  return new URLSearchParams(Object.entries(choice).filter(([name, value]) => value !== initial[name])).toString();
}

/** Change what is chosen, and keep it in the address. */
function choose(changes) {
  Object.assign(choice, changes);
  history.replaceState(null, "", `#${address() || "gallery"}`);
  update();
}

/** Take over what the address says, as far as it makes sense. */
function readAddress() {
  if (!location.hash.includes("=")) return;
  const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const known = { ...initial, ...found };
  for (const name of ["show", "sort", "class"]) {
    const isOffered = [...form.elements[name]].some(({ value }) => value === known[name]);
    choice[name] = isOffered ? known[name] : initial[name];
  }
  choice.pair = /^\d+-\d+$/.test(known.pair) && known.pair.split("-").every((id) => id in DATA.names) ? known.pair : "";
  choice.text = known.text;
}

/** Show the gallery with nothing chosen but this. */
function showOnly(changes) {
  choose({ ...initial, sort: choice.sort, ...changes });
  document.getElementById("gallery").scrollIntoView();
  focusGallery();
}

function focusGallery() {
  document.getElementById("gallery").focus({ preventScroll: true });
}

function fillForm() {
  const counts = new Map();
  for (const id of DATA.items.flatMap((item) => item.shows)) counts.set(id, (counts.get(id) ?? 0) + 1);
  const ids = [...counts.keys()].sort((a, b) => byKey(nameOf(a), nameOf(b)));
  form.elements.class.append(...ids.map((id) => new Option(`${nameOf(id)} (${counts.get(id)})`, id)));
  for (const place of form.querySelectorAll("[data-count]")) {
    place.textContent = DATA.items.filter(SHOWN[place.dataset.count]).length;
  }
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", ({ target }) => {
  const gallery = document.getElementById("gallery");
  if (target.name === "maps") gallery.classList.toggle("maps-off", !target.checked);
  else if (target.name === "opacity") document.documentElement.style.setProperty("--opacity", target.value / 100);
  else choose({ [target.name]: target.value });
});
document.getElementById("clear").addEventListener("click", () => showOnly({}));
document.getElementById("pair").addEventListener("click", () => {
  choose({ pair: "" });
  focusGallery(); // the button is gone
});
window.addEventListener("hashchange", () => {
  // a link to a section does not give up what is chosen
  if (!location.hash.includes("=") && address()) history.replaceState(null, "", `#${address()}`);
  readAddress();
  update();
});
