// Draws points by WebGL 2. The interface is that of points_cpu.js.
// Written here and not taken from a library: those that draw from binary arrays build the callers of their shaders with
// `new Function`, which the page's Content-Security-Policy forbids.

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

export const MAX_STRIDE = 31; // 31 * 8 bytes: WebGL allows strides of up to 255

export class GlPoints {
  // Throws an Error if the canvas has no WebGL 2.
  constructor(canvas) {
    this.canvas = canvas;
    this.values = {}; // to: Float32Array [2 N], from: the same, color: Uint8Array [4 N], chosen: Uint32Array
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => {
      this.initialize();
      for (const [name, values] of Object.entries(this.values)) this.set(name, values);
    });
    this.initialize();
  }

  initialize() {
    const gl = (this.gl = this.canvas.getContext("webgl2", { antialias: false, depth: false, stencil: false }));
    if (!gl) throw new Error("no WebGL 2");
    const program = gl.createProgram();
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
  }

  set(name, values) {
    this.values[name] = values;
    const gl = this.gl, target = name === "chosen" ? gl.ELEMENT_ARRAY_BUFFER : gl.ARRAY_BUFFER;
    gl.bindBuffer(target, this.buffers[name]);
    gl.bufferData(target, values, gl.DYNAMIC_DRAW);
  }

  // view: scale, offset: of the canvas, -1 .. 1; t: 0 .. 1 from `from` to `to`; size: pixels; step: every how many
  // points; chosen: how many of the chosen points, which are drawn over the others in gray; null: nothing is chosen
  draw({ scale, offset, t, size, step, chosen }) {
    const gl = this.gl, u = this.uniforms, n = this.values.to.length / 2;
    if (gl.isContextLost() || !this.values.color) return;
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform2f(u.scale, ...scale);
    gl.uniform2f(u.offset, ...offset);
    gl.uniform1f(u.t, t);
    const alpha = n > 200000 ? 0.6 : n > 20000 ? 0.75 : 0.9;
    this.pass(step, size, chosen === null ? alpha : alpha * 0.22, chosen === null ? 0 : 0.8);
    gl.drawArrays(gl.POINTS, 0, Math.ceil(n / step));
    if (!chosen) return;
    this.pass(1, size * 1.25, 0.95, 0);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.buffers.chosen);
    gl.drawElements(gl.POINTS, chosen, gl.UNSIGNED_INT, 0);
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
}
