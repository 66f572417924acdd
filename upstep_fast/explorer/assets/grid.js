// A grid over points in the plane: the nearest point to a place, and the points inside a polygon.

const EDGE = 1.25; // the grid covers -EDGE .. EDGE; points beyond lie in its outermost cells

export class Grid {
  // xy: Float32Array of x0, y0, x1, y1, ...
  constructor(xy) {
    this.xy = xy;
    const n = xy.length / 2;
    this.side = Math.max(1, Math.min(1024, Math.floor(Math.sqrt(n / 2))));
    const cells = this.side * this.side, cellOf = new Uint32Array(n);
    this.starts = new Uint32Array(cells + 1);
    for (let i = 0; i < n; i++) {
      cellOf[i] = this.cell(xy[2 * i]) + this.side * this.cell(xy[2 * i + 1]);
      this.starts[cellOf[i] + 1]++;
    }
    for (let c = 0; c < cells; c++) this.starts[c + 1] += this.starts[c];
    const next = this.starts.slice();
    this.order = new Uint32Array(n);
    for (let i = 0; i < n; i++) this.order[next[cellOf[i]]++] = i;
  }

  cell(value) {
    return Math.max(0, Math.min(this.side - 1, Math.floor(((value + EDGE) / (2 * EDGE)) * this.side)));
  }

  // Calls visit(i) for the points in the cells of a rectangle.
  visit(x0, y0, x1, y1, visit) {
    const last = this.cell(x1);
    for (let row = this.cell(y0); row <= this.cell(y1); row++) {
      const from = this.starts[row * this.side + this.cell(x0)], to = this.starts[row * this.side + last + 1];
      for (let k = from; k < to; k++) visit(this.order[k]);
    }
  }

  // Returns the point nearest to (x, y) within a radius, or -1. cost(dx, dy): Infinity leaves a point out.
  nearest(x, y, radius, cost = (dx, dy) => dx * dx + dy * dy) {
    let best = -1, least = radius * radius;
    this.visit(x - radius, y - radius, x + radius, y + radius, (i) => {
      const d = cost(this.xy[2 * i] - x, this.xy[2 * i + 1] - y);
      if (d < least) [best, least] = [i, d];
    });
    return best;
  }

  // Returns the sorted indices of the points inside a polygon [[x, y], ...], by the even-odd rule.
  inside(polygon) {
    const xs = polygon.map((p) => p[0]), ys = polygon.map((p) => p[1]);
    const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)], found = [];
    this.visit(x0, y0, x1, y1, (i) => {
      const x = this.xy[2 * i], y = this.xy[2 * i + 1];
      if (x < x0 || x > x1 || y < y0 || y > y1) return;
      let isInside = false;
      for (let a = 0, b = xs.length - 1; a < xs.length; b = a++) {
        if (ys[a] > y !== ys[b] > y && x < ((xs[b] - xs[a]) * (y - ys[a])) / (ys[b] - ys[a]) + xs[a]) isInside = !isInside;
      }
      if (isInside) found.push(i);
    });
    return Uint32Array.from(found).sort();
  }
}
