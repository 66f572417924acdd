// A scatter plot of up to millions of points: pan, zoom, hover, pick, lasso, keyboard.

import { Grid } from "./grid.js";
import { CpuPoints } from "./points_cpu.js";
import { GlPoints, MAX_STRIDE } from "./points_gl.js";

const SETTLE = 140; // ms without movement until all points are drawn again
const SLOW = 30, FAST = 19; // ms between frames: fewer or more points are drawn while the picture moves
const LEAST = 15000; // points drawn in any case
const HIT = 14; // pixels around the pointer
const MOVE = 420; // ms of the change from one map to another

// Returns what draws on a canvas: WebGL if a graphics card does it, else the processor. #webgl: WebGL in any case
function pointsOf(canvas) {
  const probe = document.createElement("canvas").getContext("webgl2", { failIfMajorPerformanceCaveat: location.hash !== "#webgl" });
  const facts = probe?.getExtension("WEBGL_debug_renderer_info");
  const name = probe ? probe.getParameter(facts ? facts.UNMASKED_RENDERER_WEBGL : probe.RENDERER) : "";
  probe?.getExtension("WEBGL_lose_context")?.loseContext();
  const isEmulated = !probe || /swiftshader|llvmpipe|software|basic render/i.test(name);
  return isEmulated && location.hash !== "#webgl" ? new CpuPoints(canvas) : new GlPoints(canvas);
}

export class Scatter {
  // host: an element. events: hover(i), pick(i), lasso(indices, isAdded), say(text)
  constructor(host, label, events) {
    this.events = events;
    this.host = host;
    this.canvas = host.appendChild(document.createElement("canvas"));
    this.overlay = host.appendChild(document.createElement("canvas"));
    this.overlay.className = "overlay";
    this.overlay.tabIndex = 0;
    this.overlay.setAttribute("role", "application");
    this.overlay.setAttribute("aria-label", label);
    this.overlay.setAttribute("aria-describedby", "map-help");
    this.ink = this.overlay.getContext("2d");
    Object.assign(this, { mode: "move", zoom: 1, x: 0, y: 0, t: 1, xy: null, from: null, colors: null, grid: null });
    Object.assign(this, { selection: null, rings: [], focus: -1, hovered: -1, path: null, pointers: new Map() });
    Object.assign(this, { budget: 150000, movedAt: 0, lastFrame: 0, frame: 0, frames: 0 });
    this.listen();
    new ResizeObserver(() => this.resize()).observe(host);
    this.points = pointsOf(this.canvas);
    this.resize();
  }

  // xy: Float32Array [2 N]. Points move from where they are.
  setPoints(xy) {
    const isStill = !this.xy || xy === this.xy || matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.from = isStill ? xy : this.xy;
    this.xy = xy;
    this.grid = null;
    this.t = isStill ? 1 : 0;
    this.startedAt = performance.now();
    this.points.set("to", xy);
    this.points.set("from", this.from);
    this.invalidate();
  }

  // colors: Uint8Array [4 N]
  setColors(colors) {
    this.colors = colors;
    this.points.set("color", colors);
    this.invalidate();
  }

  // indices: Uint32Array, or null for no selection
  setSelection(indices) {
    this.selection = indices;
    if (indices) {
      const mixed = indices.slice(); // in random order, so that any first part of it stands for all
      for (let i = mixed.length - 1, seed = 1; i > 0; i--) {
        seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
        const j = seed % (i + 1);
        [mixed[i], mixed[j]] = [mixed[j], mixed[i]];
      }
      this.points.set("chosen", mixed);
    }
    this.invalidate();
  }

  // focus: the opened image; rings: its neighbors; hovered: the image under the pointer, here or elsewhere
  setMarks(marks) {
    Object.assign(this, marks);
    this.invalidate();
  }

  reset() {
    Object.assign(this, { zoom: 1, x: 0, y: 0 });
    this.moved();
  }

  resize() {
    const ratio = Math.min(devicePixelRatio, 2), box = this.host.getBoundingClientRect();
    [this.width, this.height, this.ratio] = [box.width, box.height, ratio];
    for (const canvas of [this.canvas, this.overlay]) {
      canvas.width = Math.max(1, Math.round(box.width * ratio));
      canvas.height = Math.max(1, Math.round(box.height * ratio));
    }
    this.hadMarks = true;
    this.invalidate();
  }

  // Pixels of the host for a unit of the map, at this zoom.
  get unit() {
    return (Math.min(this.width, this.height) / 2) * this.zoom;
  }
  place(i) {
    return [this.width / 2 + (this.xy[2 * i] - this.x) * this.unit, this.height / 2 - (this.xy[2 * i + 1] - this.y) * this.unit];
  }
  toMap(px, py) {
    return [(px - this.width / 2) / this.unit + this.x, (this.height / 2 - py) / this.unit + this.y];
  }

  moved() {
    this.isMoved = true; // also if a frame takes longer than SETTLE
    this.movedAt = performance.now();
    this.invalidate();
  }
  invalidate() {
    this.frame ||= requestAnimationFrame((now) => this.draw(now));
  }

  draw(now) {
    this.frame = 0;
    this.frames++;
    if (!this.xy || !this.width) return;
    if (this.t < 1) {
      this.t = Math.min(1, (performance.now() - this.startedAt) / MOVE);
      this.movedAt = performance.now();
      this.isMoved = true;
    }
    const isMoving = this.isMoved || performance.now() - this.movedAt < SETTLE;
    this.isMoved = false;
    if (isMoving && this.wasMoving) {
      const gap = now - this.lastFrame;
      if (gap > SLOW) this.budget = Math.max(LEAST, Math.min(this.budget, this.xy.length / 2) * (gap > 4 * SLOW ? 0.4 : 0.8));
      else if (gap < FAST) this.budget = Math.min(4e6, this.budget * 1.1);
    }
    [this.wasMoving, this.lastFrame] = [isMoving, now];
    this.drawPoints(isMoving ? this.budget : Infinity);
    this.drawMarks();
    if (isMoving) this.invalidate();
  }

  drawPoints(most) {
    const n = this.xy.length / 2, scale = [(2 * this.unit) / this.width, (2 * this.unit) / this.height];
    const step = Math.min(MAX_STRIDE, Math.max(1, Math.ceil(n / most)));
    const size = Math.max(1.4, Math.min(8, 4.4 * Math.pow(5000 / n, 0.22))) * Math.pow(this.zoom, 0.3) * this.ratio;
    this.points.draw({
      scale,
      offset: [-this.x * scale[0], -this.y * scale[1]],
      t: this.t * this.t * (3 - 2 * this.t),
      size: Math.min(size * (step > 1 ? 1.15 : 1), 24),
      step,
      chosen: this.selection && Math.min(this.selection.length, most),
    });
    this.drawn = Math.ceil(n / step);
  }

  drawMarks() {
    const hasMarks = this.focus >= 0 || this.hovered >= 0 || this.rings.length > 0 || this.path !== null;
    if (!hasMarks && !this.hadMarks) return;
    this.hadMarks = hasMarks;
    const ink = this.ink, style = getComputedStyle(this.host);
    ink.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    ink.clearRect(0, 0, this.width, this.height);
    const [strong, accent] = [style.getPropertyValue("--ink"), style.getPropertyValue("--accent")];
    const ring = (i, radius, color, width) => {
      ink.beginPath();
      ink.arc(...this.place(i), radius, 0, 7);
      ink.strokeStyle = color;
      ink.lineWidth = width;
      ink.stroke();
    };
    if (this.t >= 1) {
      if (this.focus >= 0) {
        ink.strokeStyle = accent;
        ink.globalAlpha = 0.35;
        ink.lineWidth = 1;
        for (const i of this.rings) {
          ink.beginPath();
          ink.moveTo(...this.place(this.focus));
          ink.lineTo(...this.place(i));
          ink.stroke();
        }
        ink.globalAlpha = 1;
      }
      for (const i of this.rings) ring(i, 6, accent, 1.6);
      if (this.focus >= 0) {
        ring(this.focus, 9, strong, 2.4);
        ring(this.focus, 4, strong, 1.4);
      }
      if (this.hovered >= 0) ring(this.hovered, 8, strong, 2);
    }
    if (this.path) {
      ink.beginPath();
      for (const point of this.path) ink.lineTo(...point);
      ink.closePath();
      ink.globalAlpha = 0.13;
      ink.fillStyle = accent;
      ink.fill();
      ink.globalAlpha = 1;
      ink.strokeStyle = accent;
      ink.lineWidth = 1.5;
      ink.stroke();
    }
  }

  near(px, py) {
    if (!this.xy) return -1;
    this.grid ??= new Grid(this.xy);
    return this.grid.nearest(...this.toMap(px, py), HIT / this.unit);
  }

  zoomAt(px, py, factor) {
    const [mx, my] = this.toMap(px, py);
    this.zoom = Math.max(0.5, Math.min(2000, this.zoom * factor));
    this.x = mx - (px - this.width / 2) / this.unit;
    this.y = my - (this.height / 2 - py) / this.unit;
    this.moved();
  }

  listen() {
    const at = (event) => {
      const box = this.overlay.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const on = (name, handle, options) => this.overlay.addEventListener(name, handle, options);
    on("wheel", (event) => {
      event.preventDefault();
      this.zoomAt(...at(event), Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)));
    }, { passive: false });
    on("pointerdown", (event) => {
      if (event.button) return;
      this.overlay.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, at(event));
      this.hasMoved = false;
      this.start = at(event);
      this.path = (this.mode === "lasso") !== event.shiftKey && this.pointers.size === 1 ? [at(event)] : null;
    });
    on("pointermove", (event) => this.pointerMoved(event, at(event)));
    const up = (event) => {
      if (!this.pointers.delete(event.pointerId)) return;
      const path = this.path;
      this.path = null;
      if (path?.length > 2 && this.hasMoved && this.xy) {
        this.grid ??= new Grid(this.xy);
        this.events.lasso(this.grid.inside(path.map((point) => this.toMap(...point))), event.altKey || event.ctrlKey || event.metaKey);
      } else if (!this.hasMoved && event.type === "pointerup" && !this.pointers.size) {
        const i = this.near(...at(event));
        if (i >= 0) this.events.pick(i);
      }
      this.invalidate();
    };
    on("pointerup", up);
    on("pointercancel", up);
    on("pointerleave", () => this.events.hover(-1));
    on("dblclick", () => this.reset());
    on("keydown", (event) => this.keyPressed(event));
    on("blur", () => this.events.hover(-1));
  }

  pointerMoved(event, [px, py]) {
    const last = this.pointers.get(event.pointerId);
    if (!last) {
      const i = this.near(px, py);
      this.overlay.classList.toggle("on-point", i >= 0);
      this.events.hover(i, i < 0 ? null : [event.clientX, event.clientY]);
      return;
    }
    if (Math.hypot(px - this.start[0], py - this.start[1]) > 4) this.hasMoved = true;
    if (this.path) {
      const end = this.path[this.path.length - 1];
      if (Math.hypot(px - end[0], py - end[1]) > 3) this.path.push([px, py]);
      this.invalidate();
      return;
    }
    const others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    this.pointers.set(event.pointerId, [px, py]);
    if (others.length) {
      const [ox, oy] = others[0], before = Math.hypot(last[0] - ox, last[1] - oy);
      this.zoomAt((px + ox) / 2, (py + oy) / 2, Math.hypot(px - ox, py - oy) / Math.max(before, 1));
    }
    const share = others.length ? 0.5 : 1;
    this.x -= ((px - last[0]) / this.unit) * share;
    this.y += ((py - last[1]) / this.unit) * share;
    this.moved();
  }

  keyPressed(event) {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const center = [this.width / 2, this.height / 2];
    if (ways[event.key] && event.shiftKey) {
      const [dx, dy] = ways[event.key];
      this.x += (dx * 60) / this.unit;
      this.y += (dy * 60) / this.unit;
      this.moved();
    } else if (ways[event.key]) this.step(ways[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoomAt(...center, 1.4);
    else if (event.key === "-") this.zoomAt(...center, 1 / 1.4);
    else if (event.key === "0") this.reset();
    else if (event.key === "Enter" && this.hovered >= 0) this.events.pick(this.hovered);
    else if (event.key === " " && this.hovered >= 0) this.events.lasso(Uint32Array.of(this.hovered), true);
    else return;
    event.preventDefault();
  }

  // Goes from the marked point to the nearest one in a direction, within 45 degrees of it.
  step([dx, dy]) {
    if (!this.xy) return;
    this.grid ??= new Grid(this.xy);
    const from = this.hovered >= 0 ? this.hovered : this.focus;
    const [x, y] = from >= 0 ? [this.xy[2 * from], this.xy[2 * from + 1]] : [this.x, this.y];
    const cost = (ox, oy) => {
      const along = ox * dx + oy * dy, across = Math.abs(ox * dy - oy * dx);
      return along > 0 && across <= along ? along * along + 3 * across * across : Infinity;
    };
    let i = -1;
    for (let radius = 0.02; i < 0 && radius < 4; radius *= 2) i = this.grid.nearest(x, y, radius, from < 0 ? undefined : cost);
    if (i < 0) return;
    const [px, py] = this.place(i), box = this.overlay.getBoundingClientRect();
    if (px < 0 || py < 0 || px > this.width || py > this.height) {
      [this.x, this.y] = [this.xy[2 * i], this.xy[2 * i + 1]];
      this.moved();
    }
    const [qx, qy] = this.place(i);
    this.events.hover(i, [box.left + qx, box.top + qy], true);
  }
}
