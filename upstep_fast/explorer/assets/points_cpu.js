// Draws points into an image, by the processor. The interface is that of points_gl.js.
// Without a graphics card a browser emulates WebGL at about 1 us for a point; this takes about 10 ns.

const HALF = 0x80000000, FULL = 0xff000000, DIM = 0x38000000; // alpha, in little-endian RGBA words

export class CpuPoints {
  constructor(canvas) {
    this.canvas = canvas;
    this.ink = canvas.getContext("2d");
    this.values = {};
  }

  set(name, values) {
    this.values[name] = name === "color" ? new Uint32Array(values.buffer) : values;
  }

  // view: as in points_gl.js
  draw({ scale, offset, t, size, step, chosen }) {
    const { width, height } = this.canvas, n = this.values.to.length / 2;
    if (!this.values.color) return;
    if (this.image?.width !== width || this.image?.height !== height) {
      this.image = new ImageData(width, height);
      this.words = new Uint32Array(this.image.data.buffer);
    }
    this.words.fill(0);
    // x of a pixel = a x + b
    const place = [(scale[0] * width) / 2, ((offset[0] + 1) * width) / 2, (-scale[1] * height) / 2, ((1 - offset[1]) * height) / 2, t];
    this.pass(null, Math.ceil(n / step), step, size, chosen === null ? FULL : DIM, place);
    if (chosen) this.pass(this.values.chosen, chosen, 1, size * 1.25, FULL, place);
    this.ink.putImageData(this.image, 0, 0);
  }

  // Draws `count` points: those in `indices`, or every step-th.
  pass(indices, count, step, size, alpha, [ax, bx, ay, by, t]) {
    const { to, from, color } = this.values, { words } = this, { width, height } = this.canvas, isMoved = t < 1;
    const { inner, edge, margin } = disc(size, width), soft = alpha === FULL ? HALF : alpha >>> 1;
    const right = width - margin, bottom = height - margin;
    for (let k = 0; k < count; k++) {
      const i = indices ? indices[k] : k * step;
      let x = to[2 * i], y = to[2 * i + 1];
      if (isMoved) {
        x = from[2 * i] + (x - from[2 * i]) * t;
        y = from[2 * i + 1] + (y - from[2 * i + 1]) * t;
      }
      x = ax * x + bx;
      y = ay * y + by;
      if (!(x >= margin && y >= margin && x < right && y < bottom)) continue;
      const at = (y | 0) * width + (x | 0), rgb = color[i] & 0xffffff;
      for (let j = 0; j < inner.length; j++) words[at + inner[j]] = rgb | alpha;
      for (let j = 0; j < edge.length; j++) if (words[at + edge[j]] === 0) words[at + edge[j]] = rgb | soft;
    }
  }
}

// Returns the offsets of the pixels within a disc, and of those that its edge crosses.
function disc(size, width) {
  const radius = Math.max(size, 1) / 2, reach = Math.ceil(radius), inner = [], edge = [];
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const covered = radius + 0.5 - Math.hypot(x, y); // about the share of the pixel
      if (covered > 0.75) inner.push(y * width + x);
      else if (covered > 0.4) edge.push(y * width + x);
    }
  }
  return { inner: Int32Array.from(inner), edge: Int32Array.from(edge), margin: reach };
}
