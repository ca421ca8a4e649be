// The maps: decoded when first asked for, painted, and laid over their photographs.

const DATA = JSON.parse(document.getElementById("data").textContent);
const [ROWS, COLUMNS] = DATA.grid;
const NO_CELL = 65535; // in the place of a tail
const STRONGEST = 255; // alpha of a cell of which the teacher is certain

const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

function uint16Of(text) {
  const view = new DataView(bytesOf(text).buffer);
  return Uint16Array.from({ length: view.byteLength / 2 }, (_, index) => view.getUint16(2 * index, true));
}

const nameOf = (id) => DATA.names[id];
const inPercent = (permille) => `${(permille / 10).toFixed(1)}\u00a0%`;

class TokenMap {
  constructor(item) {
    this.item = item;
    this.colours = new Map(item.leading.map((known) => [known.class_id, known.colour]));
    this.cells = (item.ids.length <= 256 ? bytesOf : uint16Of)(item.cells);
    this.permille = uint16Of(item.permille);
    this.tails = uint16Of(item.tails);
    const valid = [...this.tails.keys()].filter((cell) => this.tails[cell] !== NO_CELL);
    // the cells that show the image are a rectangle
    this.first = valid.length ? this.placeOf(valid[0]) : null;
    this.last = valid.length ? this.placeOf(valid[valid.length - 1]) : null;
  }

  placeOf(cell) {
    return { row: Math.floor(cell / COLUMNS), column: cell % COLUMNS };
  }

  isValid({ row, column }) {
    const inside = row >= 0 && row < ROWS && column >= 0 && column < COLUMNS;
    return inside && this.tails[row * COLUMNS + column] !== NO_CELL;
  }

  /** The classes of a cell, the most probable first: [{id, permille}], and the tail in per mille. */
  at({ row, column }) {
    const cell = row * COLUMNS + column;
    const classes = Array.from({ length: DATA.k }, (_, rank) => ({
      id: this.item.ids[this.cells[cell * DATA.k + rank]],
      permille: this.permille[cell * DATA.k + rank],
    }));
    return { classes, tail: this.tails[cell] };
  }

  /** Left, top, width and height of a part of the map, in shares of the photograph. */
  boxOf(row, column, rows, columns) {
    const [x0, y0, x1, y1] = this.item.view;
    const [width, height] = [(x1 - x0) / COLUMNS, (y1 - y0) / ROWS];
    return [x0 + column * width, y0 + row * height, columns * width, rows * height];
  }

  canvas() {
    const canvas = element("canvas", { width: COLUMNS, height: ROWS });
    const context = canvas.getContext("2d");
    const picture = context.createImageData(COLUMNS, ROWS);
    for (let cell = 0; cell < ROWS * COLUMNS; cell += 1) {
      const place = this.placeOf(cell);
      if (!this.isValid(place)) continue;
      const { id, permille } = this.at(place).classes[0];
      const colour = Number.parseInt(this.colours.get(id).slice(1), 16);
      const alpha = Math.round((STRONGEST * permille) / 1000);
      picture.data.set([colour >> 16, (colour >> 8) & 255, colour & 255, alpha], 4 * cell);
    }
    context.putImageData(picture, 0, 0);
    return canvas;
  }
}

const decoded = new Map();

function mapOf(item) {
  if (!decoded.has(item)) decoded.set(item, new TokenMap(item));
  return decoded.get(item);
}

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [property, value] of Object.entries(properties)) {
    if (property.includes("-") || property === "role") made.setAttribute(property, value);
    else made[property] = value;
  }
  made.append(...children);
  return made;
}

function placeAt(made, box) {
  ["left", "top", "width", "height"].forEach((side, index) => (made.style[side] = `${100 * box[index]}%`));
}

const swatch = (colour) => {
  const made = element("span", { className: "swatch" });
  if (colour) made.style.background = colour;
  return made;
};

/** Lines between the cells. */
function linesOf(map) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("class", "lines");
  svg.setAttribute("viewBox", `0 0 ${COLUMNS} ${ROWS}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  if (map.first) {
    const [left, top] = [map.first.column, map.first.row];
    const [right, bottom] = [map.last.column + 1, map.last.row + 1];
    const steps = [];
    for (let row = top + 1; row < bottom; row += 1) steps.push(`M${left} ${row}H${right}`);
    for (let column = left + 1; column < right; column += 1) steps.push(`M${column} ${top}V${bottom}`);
    path.setAttribute("d", steps.join(""));
  }
  svg.append(path);
  placeAt(svg, map.boxOf(0, 0, ROWS, COLUMNS));
  return svg;
}
