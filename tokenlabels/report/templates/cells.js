// Looking into a map cell by cell, with a pointer or with the arrow keys.

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const card = document.getElementById("card");

const inBounds = (value, low, high) => Math.min(Math.max(value, low), high);
const titleOf = (cell) => `Cell ${cell.row},${cell.column}`;

function inWords(map, cell) {
  const { classes, tail } = map.at(cell);
  const told = classes.map(({ id, permille }) => `${nameOf(id)} ${inPercent(permille)}`);
  return `${titleOf(cell)}: ${told.join("; ")}; all other classes ${inPercent(tail)}`;
}

/** Rows of a table: the classes of a cell and the tail. `wrap` makes the first column of an id and its name. */
function rowsOf(map, cell, wrap) {
  const { classes, tail } = map.at(cell);
  const rows = classes.map(({ id, permille }) =>
    element(
      "tr",
      {},
      element("td", { title: nameOf(id) }, swatch(map.colours.get(id)), wrap(id)),
      element("td", { className: "figure" }, inPercent(permille)),
    ),
  );
  const rest = element("td", {}, "all other classes");
  return [...rows, element("tr", { className: "rest" }, rest, element("td", { className: "figure" }, inPercent(tail)))];
}

function showCard(map, cell, anchor) {
  const rows = element("tbody", {}, ...rowsOf(map, cell, nameOf));
  card.replaceChildren(element("p", {}, titleOf(cell)), element("table", {}, rows));
  card.hidden = false;
  const { width, height } = card.getBoundingClientRect();
  const left = inBounds(anchor.right + 14, 8, Math.max(8, window.innerWidth - width - 8));
  const below = anchor.bottom + 14;
  const top = below + height > window.innerHeight - 8 ? anchor.top - height - 14 : below;
  card.style.left = `${left}px`;
  card.style.top = `${Math.max(8, top)}px`;
}

const hideCard = () => (card.hidden = true);

/**
 * A photograph with its map, of which one cell after the other can be looked at.
 *
 * `look(cell, anchor)` is called with a cell and the rectangle on the screen that it is about, or with null; `say` with
 * words for a cell that was reached with the keyboard; `enter` when the map is clicked or Enter is pressed on it.
 */
function stackOf(item, { look, say, enter, lines }) {
  const map = mapOf(item);
  const leading = item.leading.slice(0, 3).map((known) => nameOf(known.class_id));
  const photo = element("img", { src: item.photo, alt: `${item.key}: ${leading.join("; ")}`, decoding: "async" });
  const canvas = map.canvas();
  placeAt(canvas, map.boxOf(0, 0, ROWS, COLUMNS));
  const cursor = element("div", { className: "cursor", hidden: true });
  const surface = element("div", {
    className: "map",
    tabIndex: 0,
    role: "application",
    "aria-roledescription": "label map",
    "aria-label": `Label map of ${item.key}, ${ROWS} by ${COLUMNS} cells. Arrow keys move from cell to cell.`,
  });
  surface.append(canvas, ...(lines ? [linesOf(map)] : []), cursor);
  const stack = element("div", { className: "stack" }, photo, surface);
  stack.style.aspectRatio = `${item.width} / ${item.height}`;
  stack.style.width = `${100 * Math.min(1, item.width / item.height)}%`;

  let current = map.first && {
    row: (map.first.row + map.last.row) >> 1,
    column: (map.first.column + map.last.column) >> 1,
  };

  const show = (cell, anchor) => {
    current = cell;
    placeAt(cursor, map.boxOf(cell.row, cell.column, 1, 1));
    cursor.hidden = false;
    look(cell, anchor ?? cursor.getBoundingClientRect());
  };
  const hide = () => {
    cursor.hidden = true;
    look(null);
  };
  const point = (event) => {
    const box = surface.getBoundingClientRect();
    const [x0, y0, x1, y1] = item.view;
    const x = (event.clientX - box.left) / box.width;
    const y = (event.clientY - box.top) / box.height;
    const cell = { row: Math.floor(((y - y0) / (y1 - y0)) * ROWS), column: Math.floor(((x - x0) / (x1 - x0)) * COLUMNS) };
    if (map.isValid(cell)) show(cell, new DOMRect(event.clientX, event.clientY, 0, 0));
    else hide();
  };

  let pointer = "mouse";
  surface.addEventListener("pointerdown", (event) => {
    pointer = event.pointerType;
    point(event);
  });
  surface.addEventListener("pointermove", point);
  surface.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  surface.addEventListener("click", () => pointer === "mouse" && enter()); // a finger looks first
  surface.addEventListener("focus", () => current && surface.matches(":focus-visible") && show(current));
  surface.addEventListener("blur", hide);
  surface.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (event.key === "Enter") enter();
    else if (event.key === "Escape") hideCard();
    if (!step || !current || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const row = inBounds(current.row + step[0], map.first.row, map.last.row);
    const column = inBounds(current.column + step[1], map.first.column, map.last.column);
    show({ row, column });
    say(inWords(map, { row, column }));
  });
  if (current) stack.showFirst = () => show(current);
  return stack;
}
