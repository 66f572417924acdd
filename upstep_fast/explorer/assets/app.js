// The page: two maps with linked hover, selection and neighbors, and a panel of images.

import { Scatter } from "./scatter.js";
import { categoryColor, colorsOf, rangeOf, scaleColor } from "./colors.js";
import { ask, askJson, askNumbers, bytesOf, element, namesOf, picture, tile } from "./images.js";

const SIDES = ["base", "adapted"], SIDE_NAMES = { base: "before", adapted: "after" };
const PAGE = 180, NEAREST = 12; // tiles shown at first
const POLL = 1500; // ms
const get = (id) => document.getElementById(id);
const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

const page = { facts: null, kind: "pca", isChosen: false, column: -1, values: [], selection: null, focus: -1, maps: {}, tab: "start" };
const scatters = {}, views = {};
const events = { hover: showHover, pick: (i) => open(i).catch(failed), lasso: (indices, isAdded) => select(isAdded ? union(page.selection, indices) : indices) };

// about: "state" for what was just done or failed, "umap" for the computation of the map, which says so for minutes
function say(text, kind = "", about = "state") {
  get(about).textContent = text;
  get(about).className = kind;
}
const failed = (error) => say(error.message, "error");

async function begin() {
  page.facts = await askJson("facts");
  const { title, count, columns, dims } = page.facts;
  document.title = `${title} · upstep-fast explore`;
  get("title").textContent = title;
  get("count").textContent = counted(count, "image");
  for (const [k, side] of SIDES.entries()) {
    const host = get(`map-${side}`);
    host.querySelector("small").textContent = `${dims[k]} dimensions`;
    scatters[side] = new Scatter(host, `Map of the images, ${side} features`, events);
  }
  columns.forEach((column, i) => get("color").append(element("option", { value: i, textContent: column.name })));
  get("color").append(element("option", { value: -1, textContent: "nothing" }));
  makeTabs();
  await Promise.all([showMaps("pca"), colorBy(columns.length ? 0 : -1)]);
  await poll();
}

// ---- maps

async function showMaps(kind) {
  for (const side of SIDES) page.maps[`${kind}/${side}`] ??= await askNumbers(`map/${kind}/${side}`, Float32Array);
  page.kind = kind;
  for (const side of SIDES) scatters[side].setPoints(page.maps[`${kind}/${side}`]);
  press("kinds", "kind", kind);
}

async function poll() {
  const { ready, message } = await askJson("state");
  const isReady = SIDES.every((side) => ready.some((key) => key.join("/") === `umap/${side}`));
  get("kinds").querySelector("[data-kind=umap]").disabled = !isReady;
  if (isReady) {
    say("", "", "umap");
    if (!page.isChosen) await showMaps("umap");
  } else if (message) {
    const isWorking = message.includes("being computed");
    say(message + (isWorking ? "; PCA meanwhile" : ""), isWorking ? "working" : "", "umap");
    if (isWorking) setTimeout(() => poll().catch(failed), POLL);
  }
}

function press(group, key, value) {
  for (const button of get(group).children) button.setAttribute("aria-pressed", button.dataset[key] === value);
}

function setMode(mode) {
  for (const side of SIDES) scatters[side].mode = mode;
  document.body.dataset.mode = mode;
  press("modes", "mode", mode);
}

// ---- colors

async function valuesOf(column) {
  const Kind = page.facts.columns[column].isNumber ? Float32Array : Uint16Array;
  return (page.values[column] ??= await askNumbers(`column/${column}`, Kind));
}

async function colorBy(column) {
  page.column = column;
  get("color").value = column;
  const facts = page.facts.columns[column], values = column < 0 ? null : await valuesOf(column);
  const colors = colorsOf(page.facts.count, facts, values);
  for (const side of SIDES) scatters[side].setColors(colors);
  showLegend(facts, values);
  if (page.selection) showSelection();
}

function showLegend(facts, values) {
  const legend = get("legend");
  legend.replaceChildren();
  if (!facts) return;
  if (facts.isNumber) {
    const bar = element("canvas", { width: 240, height: 1 }), ink = bar.getContext("2d"), [low, high] = rangeOf(values);
    for (let x = 0; x < 240; x++) {
      ink.fillStyle = `rgb(${scaleColor(x / 239).join(" ")})`;
      ink.fillRect(x, 0, 1, 1);
    }
    const number = (value) => Number(value.toPrecision(4)).toLocaleString("en");
    legend.append(element("span", { className: "scale" }, number(low), bar, number(high)));
    return;
  }
  const counts = new Uint32Array(facts.categories.length);
  for (const code of values) counts[code]++;
  facts.categories.slice(0, 60).forEach((name, code) => {
    const swatch = element("span", { className: "swatch" }), color = name === "(none)" || name === "(others)" ? categoryColor(99) : categoryColor(code);
    swatch.style.background = color;
    const words = [swatch, element("span", { className: "name", textContent: name }), element("small", { textContent: counts[code].toLocaleString("en") })];
    const button = element("button", { type: "button", title: `Select: ${name}` }, ...words);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const isOn = button.getAttribute("aria-pressed") === "true";
      const found = Uint32Array.from(values.keys()).filter((i) => values[i] === code);
      select(isOn ? null : found);
      if (!isOn) button.setAttribute("aria-pressed", "true");
    });
    legend.append(button);
  });
  if (counts.length > 60) legend.append(element("small", { textContent: `and ${counts.length - 60} more` }));
}

// ---- selection

function union(a, b) {
  return a ? Uint32Array.from(new Set([...a, ...b])).sort() : b;
}

function select(indices) {
  say("");
  page.selection = indices?.length ? indices : null;
  for (const side of SIDES) scatters[side].setSelection(page.selection);
  for (const button of get("legend").querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", "false");
  showSelection();
  if (page.selection) show("selection");
  get("say").textContent = page.selection ? `${counted(page.selection.length, "image")} selected` : "Nothing selected";
}

function showSelection() {
  const chosen = page.selection, view = views.selection;
  view.tab.lastChild.textContent = chosen ? ` ${chosen.length.toLocaleString("en")}` : "";
  if (!chosen) {
    view.body.replaceChildren(...startWords());
    return;
  }
  const save = element("button", { type: "button", className: "main", id: "export", textContent: "Export CSV" });
  save.addEventListener("click", () => exportCsv(chosen).catch(failed));
  const clear = element("button", { type: "button", textContent: "Clear" });
  clear.addEventListener("click", () => select(null));
  const actions = element("div", { className: "actions" }, element("b", { textContent: counted(chosen.length, "image") }), save, clear);
  view.body.replaceChildren(actions, ...shares(chosen), tiles(chosen));
}

// Returns the most frequent categories of the selection, with their shares.
function shares(chosen) {
  const facts = page.facts.columns[page.column], values = page.values[page.column], counts = new Map();
  if (!facts || facts.isNumber || !values) return [];
  for (const i of chosen) counts.set(values[i], (counts.get(values[i]) ?? 0) + 1);
  const rows = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 5).map(([code, n]) => {
    const percent = (100 * n) / chosen.length;
    const bar = element("progress", { max: 100, value: percent });
    bar.setAttribute("aria-label", facts.categories[code]);
    return element("li", {}, element("span", { textContent: facts.categories[code], title: facts.categories[code] }), bar, element("small", { textContent: `${n.toLocaleString("en")} · ${percent.toFixed(0)} %` }));
  });
  return [element("ul", { className: "shares" }, ...rows)];
}

function tiles(indices, options = () => ({}), page = PAGE) {
  const grid = element("div", { className: "grid" }), box = element("div", {}, grid);
  const more = element("button", { type: "button", className: "more" });
  const add = () => {
    const from = grid.childElementCount;
    grid.append(...Array.from(indices.slice(from, from + page), (i, k) => tile(i, events, options(from + k))));
    const left = indices.length - grid.childElementCount;
    more.textContent = left > page ? `Show ${page} more of ${left.toLocaleString("en")}` : `Show ${left} more`;
    if (left > 0) box.append(more);
    else more.remove();
  };
  more.addEventListener("click", add);
  add();
  return box;
}

async function exportCsv(indices) {
  const file = await (await ask("export", bytesOf(indices))).blob();
  const link = element("a", { href: URL.createObjectURL(file), download: "selection.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  const use = page.facts.hasFiles ? "--data reads it" : "images in archives are named, but --data reads only files by a list";
  say(`selection.csv: ${counted(indices.length, "image")}; ${use}`);
}

// ---- hover: in both maps, and a thumbnail beside the pointer

let hovered = -1;
function showHover(i, place, isSaid = false) {
  if (i === hovered && !place) return;
  const isOther = i !== hovered, box = get("hover");
  hovered = i;
  if (isOther) {
    for (const side of SIDES) scatters[side].setMarks({ hovered: i });
    for (const other of document.querySelectorAll(".tile.here")) other.classList.remove("here");
    if (i >= 0) document.querySelector(`.view:not([hidden]) .tile[data-index="${i}"]`)?.classList.add("here");
  }
  box.hidden = i < 0 || !place;
  if (box.hidden) return;
  const [x, y] = place, right = x + 200 > document.querySelector(".maps").getBoundingClientRect().right, below = y + 250 < innerHeight;
  box.style.left = `${Math.max(4, right ? x - 194 : x + 18)}px`;
  box.style.top = `${Math.max(4, below ? y + 14 : y - 236)}px`;
  if (!isOther) return;
  const shown = picture(i);
  shown.loading = "eager";
  box.firstElementChild.replaceChildren(shown);
  const words = box.querySelector("p"), facts = page.facts.columns[page.column];
  words.replaceChildren();
  namesOf([i]).then(([name]) => {
    if (hovered !== i) return;
    const value = facts ? [element("b", { textContent: `${facts.name}: ${textOf(page.column, i)}` })] : [];
    words.replaceChildren(...value, name.split("/").slice(-2).join("/"));
    if (isSaid) get("say").textContent = `${name}${facts ? `, ${textOf(page.column, i)}` : ""}`;
  }, failed);
}

function textOf(column, i) {
  const facts = page.facts.columns[column], value = page.values[column]?.[i];
  if (value === undefined || Number.isNaN(value)) return "(none)";
  return facts.isNumber ? String(Number(value.toPrecision(6))) : facts.categories[value];
}

// ---- one image, and its nearest before and after

async function open(i) {
  page.focus = i;
  say("");
  const [found, [name]] = await Promise.all([askJson(`neighbors/${i}`), namesOf([i]), ...page.facts.columns.map((_, k) => valuesOf(k))]);
  if (page.focus !== i) return;
  const values = page.facts.columns.map((column, k) => element("div", {}, element("dt", { textContent: column.name }), element("dd", { textContent: textOf(k, i) })));
  const large = picture(i, "large");
  large.alt = name;
  const head = [element("div", { className: "large" }, large), element("p", { className: "path", textContent: name }), element("dl", { className: "values" }, ...values)];
  showNeighbors(head, found, i);
}

function showNeighbors(head, found, focus) {
  const before = new Set(found.base.map(([i]) => i)), numNew = found.adapted.filter(([i]) => !before.has(i)).length;
  const lists = SIDES.map((side) => {
    const words = [shared(found[side].map(([i]) => i), focus), side === "base" || !found[side].length ? "" : numNew ? `${numNew} new, framed` : "none new"];
    const note = words.filter(Boolean).join("; ");
    const heading = element("h2", { textContent: `Nearest ${SIDE_NAMES[side]} ` }, element("small", { textContent: note }));
    heading.id = `nearest-${side}`;
    const isNew = (i) => side === "adapted" && !before.has(i);
    return element("section", {}, heading, tiles(found[side].map(([i]) => i), (k) => ({ score: found[side][k][1], isNew: isNew(found[side][k][0]) }), NEAREST));
  });
  const all = Uint32Array.from(new Set(SIDES.flatMap((side) => found[side].map(([i]) => i)))).sort();
  const button = element("button", { type: "button", textContent: "Select these neighbors" });
  button.addEventListener("click", () => select(focus < 0 ? all : union(all, [focus])));
  views.image.body.replaceChildren(...head, element("div", { className: "compared" }, ...lists), element("p", {}, button));
  views.image.body.scrollTop = 0;
  for (const side of SIDES) scatters[side].setMarks({ focus, rings: found[side].slice(0, 12).map(([i]) => i) });
  show("image");
}

// Returns how many of the neighbors have the image's category, as words.
function shared(neighbors, focus) {
  if (!neighbors.length) return "no other image";
  const facts = page.facts.columns[page.column], values = page.values[page.column];
  if (focus < 0 || !facts || facts.isNumber) return "";
  return `${neighbors.filter((i) => values[i] === values[focus]).length} of ${neighbors.length} with the same ${facts.name}`;
}

async function searchBy(file) {
  const most = page.facts.maxUpload;
  if (file.size > most) throw new Error(`${file.name} is larger than ${most >> 20} MiB, the most that can be searched by`);
  say(`Searching by ${file.name}`, "working");
  page.focus = -1;
  const found = await askJson("search", { method: "POST", body: file });
  say("");
  const shown = element("img", { alt: "the query", src: URL.createObjectURL(file) });
  shown.addEventListener("load", () => URL.revokeObjectURL(shown.src));
  shown.addEventListener("error", () => shown.replaceWith(element("span", { className: "no-picture", textContent: "the browser cannot show this format" })));
  showNeighbors([element("div", { className: "large" }, shown), element("p", { className: "path", textContent: `query: ${file.name}` })], found, -1);
}

async function find(text) {
  if (!text) return select(null);
  const { count, indices } = await askJson(`find?${new URLSearchParams({ text })}`);
  select(Uint32Array.from(indices));
  const cut = count > indices.length ? `; the first ${indices.length.toLocaleString("en")} are selected` : "";
  say(count ? `${counted(count, "name")} with "${text}"${cut}` : `No name has "${text}" in it`);
}

// ---- copies, outliers and wrong classes

const LISTS = {
  copies: ["Duplicates", "Groups of equal and nearly equal images", (group) => [element("p", { textContent: counted(group.length, "image") }), tiles(group)]],
  outliers: ["Outliers", "Images far from their nearest neighbors, the oddest first; z counts robust standard deviations"],
  classes: ["Labels", "Images whose neighbors have another class, the clearest first"],
};
let lists = null;

async function loadLists() {
  lists ??= (async () => {
    for (;;) {
      const answer = await askJson("lists");
      if (answer.state !== "computing") return answer;
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
  })();
  const answer = await lists.catch((error) => ({ state: error.message }));
  for (const [key, [, words, group]] of Object.entries(LISTS)) {
    const { body, tab } = views[key], rows = answer[key] ?? [], total = answer.totals?.[key] ?? 0;
    if (answer.state) body.replaceChildren(element("p", { className: "start", textContent: answer.state }));
    else {
      tab.lastChild.textContent = ` ${total.toLocaleString("en")}`;
      const note = total > rows.length ? `; the first ${rows.length.toLocaleString("en")} of ${total.toLocaleString("en")}` : "";
      const nothing = key === "classes" && !answer.hasLabels ? "The images have no labels: they are not in folders by class, or in a list with a column of labels." : `${words}: none found.`;
      const all = group ? rows.flat() : rows.map(([i]) => i);
      const choose = element("button", { type: "button", textContent: "Select them", disabled: !all.length });
      choose.addEventListener("click", () => select(Uint32Array.from(new Set(all)).sort()));
      const head = [element("div", { className: "actions" }, element("b", { textContent: LISTS[key][0] }), choose), element("p", { textContent: total ? words + note : nothing })];
      const shown = group ? rows.slice(0, PAGE).map((row) => element("div", { className: "group" }, ...group(row))) : key === "outliers" ? [tiles(all, (k) => ({ score: rows[k][1] }))] : rows.slice(0, PAGE).map(([i, why]) => element("div", { className: "group row" }, tile(i, events), element("p", { textContent: why })));
      body.replaceChildren(...head, ...shown);
    }
  }
}

// ---- the panel

function makeTabs() {
  for (const [key, label] of [["selection", "Selection"], ["image", "Neighbors"], ...Object.entries(LISTS).map(([key, [name]]) => [key, name])]) {
    const tab = element("button", { type: "button", id: `tab-${key}` }, label, element("small"));
    const body = element("div", { className: "view", id: `view-${key}`, tabIndex: 0 });
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", body.id);
    body.setAttribute("role", "tabpanel");
    body.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => show(key));
    get("tabs").append(tab);
    get("views").append(body);
    views[key] = { tab, body };
  }
  views.image.body.replaceChildren(element("p", { className: "start", textContent: "Click an image to see its nearest neighbors before and after, or search by an image file." }));
  for (const key of Object.keys(LISTS)) views[key].body.replaceChildren(element("p", { className: "start", textContent: "Comparing all images ..." }));
  showSelection();
  show("selection");
}

function show(key) {
  page.tab = key;
  for (const [name, { tab, body }] of Object.entries(views)) {
    tab.setAttribute("aria-selected", name === key);
    tab.tabIndex = name === key ? 0 : -1;
    body.hidden = name !== key;
  }
  if (LISTS[key]) loadLists();
}

function startWords() {
  const line = (...words) => element("li", {}, ...words), key = (text) => element("kbd", { textContent: text });
  return [
    element("div", { className: "start" }, element("p", { textContent: "Nothing is selected yet." }), element("ul", {},
      line("Select with the lasso: the button above, ", key("L"), ", or ", key("Shift"), "-drag; ", key("Alt"), " adds."),
      line("Click a point for its neighbors before and after."),
      line("Click a name in the legend to select its images."),
      line("Drop or paste an image file to search by it."),
      line("Find by name: ", key("/"), ". Zoom by wheel or pinch."))),
  ];
}

// ---- what people do

const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  get("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) get("drop").hidden = true;
});
addEventListener("drop", (event) => {
  get("drop").hidden = true;
  if (!isFile(event)) return;
  event.preventDefault();
  if (event.dataTransfer.files.length) searchBy(event.dataTransfer.files[0]).catch(failed);
});
addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) searchBy(event.clipboardData.files[0]).catch(failed);
});
get("by-image").addEventListener("click", () => get("file").click());
get("file").addEventListener("change", ({ target }) => {
  if (target.files.length) searchBy(target.files[0]).catch(failed);
  target.value = "";
});
get("find").addEventListener("submit", (event) => {
  event.preventDefault();
  find(get("find-text").value.trim()).catch(failed);
});
get("kinds").addEventListener("click", ({ target }) => {
  if (!target.dataset.kind) return;
  page.isChosen = true;
  showMaps(target.dataset.kind).catch(failed);
});
get("modes").addEventListener("click", ({ target }) => target.dataset.mode && setMode(target.dataset.mode));
get("sides").addEventListener("click", ({ target }) => {
  if (!target.dataset.side) return;
  document.body.dataset.side = target.dataset.side;
  press("sides", "side", target.dataset.side);
});
get("reset").addEventListener("click", () => SIDES.forEach((side) => scatters[side].reset()));
get("color").addEventListener("change", ({ target }) => colorBy(Number(target.value)).catch(failed));
get("tabs").addEventListener("keydown", (event) => {
  const keys = Object.keys(views), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  show(keys[(keys.indexOf(page.tab) + step + keys.length) % keys.length]);
  views[page.tab].tab.focus();
});
addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "l") setMode("lasso");
  else if (event.key === "m") setMode("move");
  else if (event.key === "/") get("find-text").focus();
  else if (event.key === "Escape") {
    select(null);
    for (const side of SIDES) scatters[side].setMarks({ focus: -1, rings: [] });
  } else return;
  event.preventDefault();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => SIDES.forEach((side) => scatters[side].invalidate()));

globalThis.explorer = { page, scatters, select, colorBy, showMaps }; // for the console, and for tests
begin().catch(failed);
