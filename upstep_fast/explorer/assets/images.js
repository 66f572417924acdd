// What the page asks the server for, and pictures as elements.

// Returns the answer of a route. Throws an Error with the server's words.
export async function ask(route, options) {
  let answer;
  try {
    answer = await fetch(`api/${route}`, options);
  } catch {
    throw new Error("The server does not answer. Is upstep-fast explore still running?");
  }
  if (answer.ok) return answer;
  const words = await answer.json().then((body) => body.error, () => answer.statusText);
  throw new Error(words);
}

export const askJson = async (route, options) => (await ask(route, options)).json();
export const askNumbers = async (route, Kind) => new Kind(await (await ask(route)).arrayBuffer());
export const bytesOf = (indices) => ({ method: "POST", body: Uint32Array.from(indices) });

const names = new Map();
let wanted = [], waiting = null;

// Returns the names of images, a few hundred in one request.
export async function namesOf(indices) {
  wanted.push(...indices.filter((i) => !names.has(i)));
  waiting ??= new Promise((resolve) => setTimeout(resolve, 15)).then(async () => {
    const missing = [...new Set(wanted)];
    [wanted, waiting] = [[], null];
    for (let k = 0; k < missing.length; k += 1000) {
      const some = missing.slice(k, k + 1000), answer = await askJson("names", bytesOf(some));
      some.forEach((i, at) => names.set(i, answer[at]));
    }
  });
  await waiting;
  return indices.map((i) => names.get(i));
}

export function element(tag, properties = {}, ...children) {
  const { dataset, ...rest } = properties, made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, dataset);
  made.append(...children);
  return made;
}

// Returns a picture; one that cannot be shown says so in its place.
export function picture(i, route = "image") {
  const image = element("img", { alt: "", decoding: "async", loading: "lazy", draggable: false });
  const words = route === "large" ? "no picture: the file was moved, or cannot be read" : "no picture";
  image.addEventListener("error", () => image.replaceWith(element("span", { className: "no-picture", textContent: words })));
  image.src = `api/${route}/${i}`;
  return image;
}

// Returns a button with a picture. score: a similarity, shown below; isNew: framed. events: hover(i), pick(i)
export function tile(i, events, { score, isNew = false } = {}) {
  const button = element("button", { type: "button", className: isNew ? "tile new" : "tile", dataset: { index: i } }, picture(i));
  if (score !== undefined) button.append(element("span", { className: "score", textContent: score.toFixed(3) }));
  namesOf([i]).then(([name]) => {
    button.title = name;
    const words = [name, score === undefined ? "" : score.toFixed(3), isNew ? "new among the nearest" : ""];
    button.setAttribute("aria-label", words.filter(Boolean).join(", "));
  }, () => {});
  button.addEventListener("click", () => events.pick(i));
  for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => events.hover(i));
  for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => events.hover(-1));
  return button;
}
