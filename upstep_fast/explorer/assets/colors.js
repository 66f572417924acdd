// Colors of points by a column: categories by a palette, numbers by a scale.

// Twelve colors that stay apart for color-blind readers as far as twelve can, on light and dark.
export const PALETTE = ["#3b82d6", "#e8702a", "#2fa36b", "#b457c8", "#d6a419", "#e0476b", "#17a3b8", "#8a6d4b", "#7b74e0", "#7fae2c", "#e58fb9", "#5f7f8f"];
const REST = "#9aa1a9";
const SCALE = ["#443a83", "#31688e", "#21918c", "#35b779", "#8fd744", "#fde725"]; // viridis
export const PLAIN = "#3b82d6";

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

export function categoryColor(code) {
  return code < PALETTE.length ? PALETTE[code] : REST;
}

export function scaleColor(share) {
  const at = Math.max(0, Math.min(1, share)) * (SCALE.length - 1), low = Math.min(SCALE.length - 2, Math.floor(at));
  const [a, b] = [rgb(SCALE[low]), rgb(SCALE[low + 1])];
  return a.map((value, k) => Math.round(value + (b[k] - value) * (at - low)));
}

// Returns Uint8Array [4 N]. column: {isNumber, categories}, values: its numbers; null: one color.
export function colorsOf(count, column, values) {
  const result = new Uint8Array(4 * count), words = new Uint32Array(result.buffer);
  const word = ([r, g, b]) => new Uint32Array(Uint8Array.of(r, g, b, 255).buffer)[0];
  if (!column) return words.fill(word(rgb(PLAIN))), result;
  if (column.isNumber) {
    const [low, high] = rangeOf(values), steps = Array.from({ length: 256 }, (_, i) => word(scaleColor(i / 255)));
    const none = word(rgb(REST)), width = high - low || 1;
    for (let i = 0; i < count; i++) {
      const share = (values[i] - low) / width;
      words[i] = Number.isNaN(share) ? none : steps[Math.max(0, Math.min(255, Math.round(share * 255)))];
    }
    return result;
  }
  const codes = column.categories.map((name, code) => word(rgb(name === "(none)" || name === "(others)" ? REST : categoryColor(code))));
  for (let i = 0; i < count; i++) words[i] = codes[values[i]];
  return result;
}

// Returns the 1st and 99th percentile of the numbers that are there.
export function rangeOf(values) {
  const step = Math.max(1, Math.floor(values.length / 50000)), some = [];
  for (let i = 0; i < values.length; i += step) if (!Number.isNaN(values[i])) some.push(values[i]);
  some.sort((a, b) => a - b);
  return some.length ? [some[Math.floor(some.length * 0.01)], some[Math.ceil(some.length * 0.99) - 1]] : [0, 1];
}
