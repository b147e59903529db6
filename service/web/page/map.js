// SPDX-License-Identifier: Apache-2.0
// A map of an image's extents: the class of each cell, and the cells on a canvas.

// Decodes [value, run, value, run, ...].
export function runs(encoded) {
  const values = [];
  for (let at = 0; at < encoded.length; at += 2) {
    for (let left = encoded[at + 1]; left > 0; left--) values.push(encoded[at]);
  }
  return values;
}

// Per layer: the classes of cells, as [name, CSS variable, words of the legend].
export const LAYERS = {
  resident: [
    ["none", "--none", "not in memory"],
    ["quarter", "--resident-1", "up to ¼"],
    ["half", "--resident-2", "½"],
    ["most", "--resident-3", "more"],
    ["all", "--resident-4", "resident"],
  ],
  refs: [
    ["none", "--none", "not in memory"],
    ["0", "--refs-0", "no guest"],
    ["1", "--refs-1", "1"],
    ["2-3", "--refs-2", "2–3"],
    ["4-7", "--refs-3", "4–7"],
    ["8-15", "--refs-4", "8–15"],
    ["16+", "--refs-5", "16 guests or more"],
  ],
  heat: [
    ["none", "--none", "not in memory"],
    ...["cold", "1", "2", "3", "4", "5", "hot"].map((word, step) => [
      String(step), `--heat-${step}`, step % 6 ? "" : word,
    ]),
  ],
};

export class ExtentMap {
  constructor(encoded) {
    this.nrExtents = encoded.nr_extents;
    this.perCell = encoded.extents_per_cell;
    this.nrCells = encoded.nr_cells;
    for (const layer of ["resident", "pinned", "refs", "heat"]) this[layer] = runs(encoded[layer]);
  }

  extentsIn(cell) {
    return Math.min(this.perCell, this.nrExtents - cell * this.perCell);
  }

  // The index of the cell's class in LAYERS[layer].
  classOf(layer, cell) {
    const resident = this.resident[cell];
    if (!resident) return 0;
    if (layer === "resident") {
      const share = resident / this.extentsIn(cell);
      return share === 1 ? 4 : share > 0.5 ? 3 : share > 0.25 ? 2 : 1;
    }
    if (layer === "heat") return 1 + Math.min(6, this.heat[cell]);
    return 1 + Math.min(5, 32 - Math.clz32(this.refs[cell]));
  }

  // The number of cells of each class, by name.
  counts(layer) {
    const counts = {};
    for (const [name] of LAYERS[layer]) counts[name] = 0;
    for (let cell = 0; cell < this.nrCells; cell++) {
      counts[LAYERS[layer][this.classOf(layer, cell)][0]]++;
    }
    return counts;
  }
}

// Lays out the cells in rows over the whole width, as large as the height allows.
export function layOut(nrCells, width) {
  for (let least = 16; ; least--) {
    const columns = Math.max(1, Math.floor(width / least));
    const rows = Math.ceil(nrCells / columns);
    const size = width / columns;
    if (least === 5 || rows * size <= 200) return { size, columns, rows };
  }
}

export function scaled(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
  return pen;
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Draws the map; canvas.layout has the places of its cells.
export function drawMap(canvas, map, layer) {
  const width = canvas.clientWidth || 300;
  const layout = layOut(map.nrCells, width);
  const pen = scaled(canvas, width, layout.rows * layout.size);
  const gap = layout.size > 7 ? 2 : 1;
  const dot = Math.max(2, Math.round(layout.size / 4));
  const within = (layout.size - gap - dot) / 2;
  const colours = LAYERS[layer].map(([, variable]) => colour(variable));
  const pin = colour("--pin");
  for (let cell = 0; cell < map.nrCells; cell++) {
    const x = (cell % layout.columns) * layout.size;
    const y = Math.floor(cell / layout.columns) * layout.size;
    pen.fillStyle = colours[map.classOf(layer, cell)];
    pen.fillRect(x, y, layout.size - gap, layout.size - gap);
    if (layer === "resident" && map.pinned[cell]) {
      pen.fillStyle = pin;
      pen.fillRect(x + within, y + within, dot, dot);
    }
  }
  canvas.layout = layout;
}

// The cell under a point of the canvas, or -1.
export function cellAt(canvas, map, x, y) {
  const { size, columns } = canvas.layout;
  const column = Math.floor(x / size);
  const cell = Math.floor(y / size) * columns + column;
  return column < columns && cell >= 0 && cell < map.nrCells ? cell : -1;
}
