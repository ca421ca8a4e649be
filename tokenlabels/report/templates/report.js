// Tables that sort, links into the gallery, light and dark; then the gallery itself.

function sortBy(button) {
  const head = button.closest("th");
  const table = head.closest("table");
  const isFigure = head.classList.contains("figure");
  const old = head.getAttribute("aria-sort");
  // figures begin with the largest, names with the first
  const direction = old ? (old === "ascending" ? "descending" : "ascending") : isFigure ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
  const valueOf = (row) => row.cells[head.cellIndex].dataset.value;
  const compare = isFigure ? (a, b) => valueOf(a) - valueOf(b) : (a, b) => byKey(valueOf(a), valueOf(b));
  const sign = direction === "ascending" ? 1 : -1;
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => sign * compare(a, b)));
}

for (const button of document.querySelectorAll(".sort")) button.addEventListener("click", () => sortBy(button));
for (const button of document.querySelectorAll("[data-class]")) {
  button.addEventListener("click", () => showOnly({ class: button.dataset.class }));
}
for (const button of document.querySelectorAll("[data-pair]")) {
  button.addEventListener("click", () => showOnly({ pair: button.dataset.pair }));
}
for (const cell of document.querySelectorAll("td[data-key]")) {
  const item = DATA.items.find(({ key, shard }) => key === cell.dataset.key && shard === cell.dataset.shard);
  if (!item) continue;
  const button = element("button", { type: "button", className: "link" }, item.key);
  button.addEventListener("click", () => openLarge(item));
  cell.replaceChildren(button);
}

const theme = document.getElementById("theme");
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => (theme.textContent = isDark() ? "Light theme" : "Dark theme");
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
prefersDark.addEventListener("change", nameTheme);
nameTheme();

fillForm();
readAddress();
update();
if (location.hash.includes("=")) document.getElementById("gallery").scrollIntoView();
