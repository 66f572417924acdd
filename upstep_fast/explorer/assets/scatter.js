// A scatter plot of up to millions of points in WebGL 2: pan, zoom, hover, pick, lasso, keyboard.
// Written here and not taken from a library: those that draw from binary arrays build their shaders' callers with
// `new Function`, which the page's Content-Security-Policy forbids.

import { Grid } from "./grid.js";

const VERTEX = `#version 300 es
layout(location = 0) in vec2 to;
layout(location = 1) in vec2 from;
layout(location = 2) in vec4 color;
uniform vec2 scale, offset;
uniform float t, size, alpha, gray;
out vec4 fill;
void main() {
  gl_Position = vec4(mix(from, to, t) * scale + offset, 0, 1);
  gl_PointSize = size;
  float a = color.a * alpha;
  fill = vec4(mix(color.rgb, vec3(.55), gray) * a, a);
}`;
const FRAGMENT = `#version 300 es
precision highp float; // as in the vertex shader: both have "size"
in vec4 fill;
uniform float size;
out vec4 result;
void main() {
  float edge = size < 3. ? 1. : clamp((.5 - length(gl_PointCoord - .5)) * size + .5, 0., 1.);
  result = fill * edge;
}`;

const MAX_STRIDE = 31; // 31 * 8 bytes: WebGL allows strides of up to 255
const SETTLE = 140; // ms without movement until all points are drawn again
const SLOW = 30, FAST = 19; // ms between frames: fewer or more points are drawn while the picture moves
const HIT = 14; // pixels around the pointer
const MOVE = 420; // ms of the change from one map to another

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
    this.canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    this.canvas.addEventListener("webglcontextrestored", () => this.initialize());
    this.listen();
    new ResizeObserver(() => this.resize()).observe(host);
    this.isWorking = this.initialize();
  }

  initialize() {
    const gl = (this.gl = this.canvas.getContext("webgl2", { antialias: false, depth: false, stencil: false }));
    if (!gl) return false;
    const program = (this.program = gl.createProgram());
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(`WebGL: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    this.uniforms = {};
    for (const name of ["scale", "offset", "t", "size", "alpha", "gray"]) this.uniforms[name] = gl.getUniformLocation(program, name);
    this.buffers = { to: gl.createBuffer(), from: gl.createBuffer(), color: gl.createBuffer(), chosen: gl.createBuffer() };
    for (const i of [0, 1, 2]) gl.enableVertexAttribArray(i);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    if (this.xy) this.upload();
    this.resize();
    return true;
  }

  upload() {
    this.fill("to", this.xy);
    this.fill("from", this.from ?? this.xy);
    if (this.colors) this.fill("color", this.colors);
    this.setSelection(this.selection);
  }

  fill(name, values, target = this.gl.ARRAY_BUFFER) {
    this.gl.bindBuffer(target, this.buffers[name]);
    this.gl.bufferData(target, values, this.gl.DYNAMIC_DRAW);
  }

  // xy: Float32Array [2 N]. Points move from where they are.
  setPoints(xy) {
    const isStill = !this.xy || xy === this.xy || matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.from = isStill ? xy : this.xy;
    this.xy = xy;
    this.grid = null;
    this.t = isStill ? 1 : 0;
    this.startedAt = performance.now();
    if (this.isWorking) {
      this.fill("to", xy);
      this.fill("from", this.from);
    }
    this.invalidate();
  }

  // colors: Uint8Array [4 N]
  setColors(colors) {
    this.colors = colors;
    if (this.isWorking) this.fill("color", colors);
    this.invalidate();
  }

  // indices: Uint32Array, or null for no selection
  setSelection(indices) {
    this.selection = indices;
    if (indices && this.isWorking) {
      const mixed = indices.slice(); // in random order, so that any first part of it stands for all
      for (let i = mixed.length - 1, seed = 1; i > 0; i--) {
        seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
        const j = seed % (i + 1);
        [mixed[i], mixed[j]] = [mixed[j], mixed[i]];
      }
      this.fill("chosen", mixed, this.gl.ELEMENT_ARRAY_BUFFER);
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
    }
    const isMoving = performance.now() - this.movedAt < SETTLE;
    if (isMoving && this.wasMoving) {
      const gap = now - this.lastFrame;
      if (gap > SLOW) this.budget = Math.max(15000, this.budget * 0.8);
      else if (gap < FAST) this.budget = Math.min(4e6, this.budget * 1.1);
    }
    [this.wasMoving, this.lastFrame] = [isMoving, now];
    if (this.isWorking && !this.gl.isContextLost()) this.drawPoints(isMoving ? this.budget : Infinity);
    this.drawMarks();
    if (isMoving) this.invalidate();
  }

  drawPoints(most) {
    const gl = this.gl, n = this.xy.length / 2, u = this.uniforms;
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const [sx, sy] = [(2 * this.unit) / this.width, (2 * this.unit) / this.height];
    gl.uniform2f(u.scale, sx, sy);
    gl.uniform2f(u.offset, -this.x * sx, -this.y * sy);
    const ease = this.t * this.t * (3 - 2 * this.t);
    gl.uniform1f(u.t, ease);
    const step = Math.min(MAX_STRIDE, Math.max(1, Math.ceil(n / most)));
    const size = Math.max(1.4, Math.min(8, 4.4 * Math.pow(5000 / n, 0.22))) * Math.pow(this.zoom, 0.3) * this.ratio;
    const alpha = n > 200000 ? 0.6 : n > 20000 ? 0.75 : 0.9;
    this.pass(step, size * (step > 1 ? 1.15 : 1), this.selection ? alpha * 0.22 : alpha, this.selection ? 0.8 : 0);
    gl.drawArrays(gl.POINTS, 0, Math.ceil(n / step));
    if (this.selection?.length) {
      this.pass(1, size * 1.25, 0.95, 0);
      gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.buffers.chosen);
      gl.drawElements(gl.POINTS, Math.min(this.selection.length, most), gl.UNSIGNED_INT, 0);
    }
    this.drawn = Math.ceil(n / step);
  }

  pass(step, size, alpha, gray) {
    const gl = this.gl, u = this.uniforms;
    for (const [i, name, width, type] of [[0, "to", 2, gl.FLOAT], [1, "from", 2, gl.FLOAT], [2, "color", 4, gl.UNSIGNED_BYTE]]) {
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
      gl.vertexAttribPointer(i, width, type, type !== gl.FLOAT, step * (type === gl.FLOAT ? 8 : 4), 0);
    }
    gl.uniform1f(u.size, Math.min(size, 40));
    gl.uniform1f(u.alpha, alpha);
    gl.uniform1f(u.gray, gray);
  }

  drawMarks() {
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
