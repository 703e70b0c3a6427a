// The face of the reading room: draws what `llava_ta.room` knows, and says what the reader does.
// It fetches nothing. `render` works with a live kernel, or with a frozen state (see `frozen_room`).

const UPLOAD = 1 << 20; // bytes of a piece: far below any limit of a websocket's messages
const PARTS = { film: "whole film", part: "part shown", text: "text" };
const LEVELS = { ok: "Good", warn: "Take care", error: "Not possible" };

/** Make an element: `h("p", {class: "x", onclick: f}, "text", child)`. */
function h(tag, props = {}, ...children) {
  const svg = ["svg", "image", "path", "g", "clipPath", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const fill = (node, ...children) => node.replaceChildren(...children.flat().filter(Boolean));
const percent = (share) => `${Math.round(100 * share)} %`;

/** The film with its layers, its regions and what they are. */
function viewer(model, view, id) {
  const film = h("svg", { class: "film", role: "img", preserveAspectRatio: "xMidYMid meet" });
  const toggles = h("fieldset", { class: "regions" });
  const sides = h("div", { class: "sides", role: "radiogroup", "aria-label": "Which image the map is drawn on" });
  const caption = h("p", { class: "caption" });
  const node = h("section", { class: "viewer", "aria-label": "Film" }, film, caption, sides, toggles);

  function draw() {
    const about = model.get("film"), gaze = model.get("gaze"), masks = model.get("masks");
    const [height, width] = about.shown || [300, 300];
    film.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const at = { width, height, preserveAspectRatio: "none" };
    const part = view.side === "part" && gaze.part;
    const layers = [h("title", {}, about.name ? `Film ${about.name}, ${about.height} by ${about.width} pixels` : "No film")];
    if (about.picture) {
      const masked = part && gaze.path;
      layers.push(h("image", { href: about.picture, ...at, opacity: masked ? 0.12 : 1 }));
      if (masked) {
        layers.push(h("clipPath", { id: `${id}-part` }, h("path", { d: gaze.path, "clip-rule": "evenodd" })));
        layers.push(h("image", { href: about.picture, ...at, "clip-path": `url(#${id}-part)` }));
      }
      if (gaze.film) layers.push(h("image", { class: "heat", href: part ? gaze.part : gaze.film, ...at }));
    }
    for (const mask of masks) {
      const style = `stroke:${mask.colour};fill:${mask.colour}`;
      if (mask.path && view.masks && !view.hidden.has(mask.region))
        layers.push(h("path", { class: "region", "data-region": mask.region, d: mask.path, style }));
    }
    if (gaze.path) layers.push(h("path", { class: "shown", d: gaze.path }));
    fill(film, ...layers);
    film.classList.toggle("empty", !about.picture);
    film.classList.toggle("looking", Boolean(gaze.item)); // regions step back behind the map
    drawCaption(about, gaze);
    drawSides(gaze);
  }

  function drawCaption(about, gaze) {
    if (!gaze.item) {
      const kind = about.kind ? `${about.kind}, ` : "";
      fill(caption, about.name ? `${about.name}: ${kind}${about.height} x ${about.width} pixels` : "Drop a film here.");
      return;
    }
    const every = [...model.get("sentences"), ...model.get("narrative")].find((one) => one.item === gaze.item);
    const words = every ? (gaze.word < 0 ? every.text || "(nothing)" : every.words[gaze.word]) : "";
    const shares = Object.entries(gaze.shares).map(([name, share]) => `${PARTS[name]} ${percent(share)}`).join(", ");
    fill(caption, h("b", {}, `“${words}”`), ` looks at: ${shares}. Orange: more than an even share.`,
        gaze.path ? " Dashed: the part that is shown for this topic; on S, what lies outside was black to the model." : "");
  }

  function drawSides(gaze) {
    sides.hidden = !gaze.part;
    if (sides.hidden) return;
    const choice = (name, text) => h("label", {}, h("input", {
      type: "radio", name: `${id}-side`, value: name, checked: view.side === name,
      onchange: () => { view.side = name; draw(); },
    }), text);
    fill(sides, choice("film", "map on the whole film (I)"), choice("part", "map on the part shown (S)"));
  }

  function drawToggles() {
    const masks = model.get("masks");
    toggles.hidden = !masks.length;
    const all = h("label", { class: "all" }, h("input", {
      type: "checkbox", checked: view.masks, "aria-keyshortcuts": "m",
      onchange: (event) => { view.masks = event.target.checked; draw(); },
    }), "all (M)");
    const boxes = masks.map((mask, number) => h("label", { style: `border-color:${mask.colour}` }, h("input", {
      type: "checkbox", checked: !view.hidden.has(mask.region), disabled: !mask.path, "data-region": mask.region,
      "aria-keyshortcuts": String(number + 1),
      onchange: (event) => { view.hidden[event.target.checked ? "delete" : "add"](mask.region); draw(); },
    }), `${mask.region}${mask.status === "ok" ? "" : `: ${mask.status === "empty" ? "not found" : mask.status}`}`));
    fill(toggles, h("legend", {}, "Regions"), all, ...boxes);
  }

  function toggle(number) { // 0: all masks; 1 to 7: one of them
    const mask = model.get("masks")[number - 1];
    if (number === 0) view.masks = !view.masks;
    else if (mask) view.hidden[view.hidden.has(mask.region) ? "delete" : "add"](mask.region);
    drawToggles();
    draw();
  }
  return { node, draw, drawToggles, toggle };
}

/** Sentences as a grid: a row each, with a head for the whole sentence and a cell for each word. */
function sentences(model, send, label, names, editable) {
  const grid = h("div", { class: "sentences", role: "grid", "aria-label": label });
  let current = [0, 0], editing = "";

  const rows = () => [...grid.querySelectorAll('[role="row"]')];
  const cells = (row) => [...row.querySelectorAll("[data-cell]")];

  function focus(row, cell) {
    const every = rows();
    if (!every.length) return;
    row = Math.max(0, Math.min(row, every.length - 1));
    cell = Math.max(0, Math.min(cell, cells(every[row]).length - 1));
    current = [row, cell];
    for (const one of grid.querySelectorAll("[data-cell]")) one.setAttribute("tabindex", -1);
    const found = cells(every[row])[cell];
    found.setAttribute("tabindex", 0);
    found.focus();
  }

  function act(row, cell) {
    const one = model.get(names)[row];
    if (!one || one.item === editing) return;
    if (cell > one.words.length) edit(one.item);
    else send({ do: "look", item: one.item, word: cell - 1 });
  }

  function edit(item) {
    const open = grid.querySelector("textarea");
    if (editing && editing !== item && open) send({ do: "edit", item: editing, text: open.value }); // nothing typed is lost
    editing = item;
    draw();
    grid.querySelector("textarea")?.focus();
  }

  function finish(item, text) {
    const row = model.get(names).findIndex((one) => one.item === item);
    editing = "";
    if (text !== null) send({ do: "edit", item, text });
    draw();
    focus(row, 0);
  }

  grid.addEventListener("click", (event) => {
    const found = event.target.closest("[data-cell]");
    if (!found) return;
    const row = rows().indexOf(found.closest('[role="row"]')), cell = Number(found.dataset.cell);
    focus(row, cell);
    act(row, cell);
  });

  grid.addEventListener("keydown", (event) => {
    if (event.target.tagName === "TEXTAREA") {
      if (event.key === "Escape") finish(editing, null);
      else if (event.key === "Enter" && !event.shiftKey) finish(editing, event.target.value);
      else return;
      event.preventDefault();
      event.stopPropagation();
      return;
    }
    const [row, cell] = current;
    const last = cells(rows()[row] || grid).length - 1;
    const moves = { ArrowUp: [row - 1, 0], ArrowDown: [row + 1, 0], ArrowLeft: [row, cell - 1],
      ArrowRight: [row, cell + 1], Home: [row, 0], End: [row, last] };
    if (moves[event.key]) focus(...moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") act(row, cell);
    else if (event.key.toLowerCase() === "e" && editable) edit(model.get(names)[row]?.item);
    else return;
    event.preventDefault();
  });

  function editor(one) {
    const area = h("textarea", { rows: 2, "aria-label": `Sentence on ${one.name}` });
    area.value = one.text;
    return h("div", { class: "editor" }, area,
      h("button", { onclick: () => finish(one.item, area.value) }, "Keep (Enter)"),
      h("button", { onclick: () => finish(one.item, null) }, "Cancel (Esc)"),
      one.edited ? h("button", { onclick: () => finish(one.item, one.written) }, "As it was written") : null);
  }

  function row(one, gaze, truth) {
    const lit = gaze.item === one.item, cell = { tabindex: -1 };
    const head = h("span", { class: `name${lit && gaze.word < 0 ? " lit" : ""}`, role: "rowheader", "data-cell": 0,
      ...cell, title: "where the whole sentence looks" }, one.name || "sentence");
    const words = one.words.map((word, number) => h("span", { role: "gridcell", "data-cell": number + 1, ...cell,
      class: `word${lit && (gaze.word === number || gaze.word < 0) ? " lit" : ""}` }, word));
    const extra = editable ? [h("span", { class: "edit", role: "gridcell", "data-cell": one.words.length + 1, ...cell,
      "aria-label": `Edit the sentence on ${one.name}` }, "edit")] : [];
    const of = editable ? "probability of these words" : "probability of the whole report";
    const by = one.edited ? "edited by you" : one.score === null ? "" : `${of} ${one.score.toFixed(2)}`;
    const said = words.length ? words.flatMap((word) => [word, " "]) : [h("i", { role: "gridcell" }, "(nothing) ")];
    return h("div", { role: "row", class: lit ? "finding lit" : "finding", "data-item": one.item }, head,
      editing === one.item ? editor(one) : h("span", { class: "said", role: "presentation" }, ...said, ...extra),
      h("small", { class: one.edited ? "by edited" : "by", role: "presentation" }, by),
      truth ? h("small", { class: "truth", role: "presentation" }, `truth: ${truth}`) : null);
  }

  const drawn = new Map(); // item -> [what a row was drawn from, the row]: one that did not change stays in place
  function draw() {
    const gaze = model.get("gaze"), truth = model.get("truth").topics || {}, every = model.get(names);
    const held = grid.contains(document.activeElement) && document.activeElement.dataset.cell !== undefined;
    const wanted = every.map((one) => {
      const about = gaze.item === one.item && editing !== one.item ? { item: gaze.item, word: gaze.word } : {};
      const key = JSON.stringify([one, about, truth[one.topic], editing === one.item]);
      if (drawn.get(one.item)?.[0] !== key) drawn.set(one.item, [key, row(one, about, truth[one.topic])]);
      return drawn.get(one.item)[1];
    });
    for (const old of [...grid.children]) if (!wanted.includes(old)) old.remove();
    wanted.forEach((node, place) => { if (grid.children[place] !== node) grid.insertBefore(node, grid.children[place] || null); });
    const at = cells(wanted[current[0]] || grid)[current[1]] || grid.querySelector("[data-cell]");
    at?.setAttribute("tabindex", 0);
    if (held && document.activeElement !== at) focus(...current);
  }
  function forget() { // an editor that is open belongs to the film that was there
    editing = "";
    draw();
  }
  return { node: grid, draw, forget };
}

/** Send a file piece by piece; the next goes when the last has arrived. */
function uploader(model, send, say) {
  let file = null, id = 0;
  async function next(offset) {
    const piece = await file.slice(offset, offset + UPLOAD).arrayBuffer();
    send({ do: "upload", id, name: file.name, size: file.size, offset }, [piece]);
  }
  model.on("msg:custom", (message) => {
    if (message.type !== "upload" || message.id !== id || !file) return;
    say({ what: `loading ${file.name}`, done: message.have, of: file.size });
    if (message.stop || message.have >= file.size) { file = null; say({}); } else next(message.have);
  });
  return (chosen) => {
    if (!chosen) return;
    file = chosen;
    id = Date.now();
    say({ what: `loading ${file.name}`, done: 0, of: file.size });
    next(0);
  };
}

/** Put a file together from its pieces and hand it to the reader. */
function downloader(model) {
  const parts = new Map();
  model.on("msg:custom", async (message, buffers) => {
    if (message.type !== "file") return;
    const known = parts.get(message.id) || [];
    known[message.part] = buffers[0];
    parts.set(message.id, known);
    if (Object.keys(known).length < message.parts) return;
    parts.delete(message.id);
    const packed = new Blob(known).stream().pipeThrough(new DecompressionStream("gzip"));
    const url = URL.createObjectURL(await new Response(packed).blob());
    const link = h("a", { href: url, download: message.name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
}

function topics(model, send) {
  const list = h("div", { class: "list" });
  const buttons = h("div", { class: "buttons" });
  const summary = h("summary", {}, "Topics");
  const node = h("details", { class: "topics" }, summary, buttons, list);
  function draw() {
    const every = model.get("topics"), about = model.get("about");
    node.hidden = !every.length;
    const asked = every.filter((one) => one.asked).map((one) => one.topic);
    fill(summary, `Topics: ${asked.length} of ${every.length} are asked`);
    const choice = (how, text) => h("button", { onclick: () => send({ do: "choose", topics: how }) }, text);
    fill(buttons, about.selector ? choice("selector", "what the selector chooses") : null, choice("all", "all"),
      choice("none", "none"));
    const held = list.contains(document.activeElement) ? document.activeElement.value : null;
    fill(list, ...every.map((one) => h("label", {}, h("input", { type: "checkbox", value: one.topic, checked: one.asked,
      onchange: (event) => send({ do: "choose", topics: event.target.checked ? [...asked, one.topic]
        : asked.filter((topic) => topic !== one.topic) }) }), one.name,
    h("small", {}, one.probability === null ? "" : ` ${percent(one.probability)}`))));
    if (held) list.querySelector(`input[value="${held}"]`)?.focus();
  }
  return { node, draw };
}

function opener(model, send, upload, id) {
  const select = h("select", { id: `${id}-films`, onchange: () => select.value && open(select.value, "") });
  const picker = h("input", { type: "file", class: "file", id: `${id}-file`, onchange: () => {
    upload(picker.files[0]);
    picker.value = ""; // so that the same file can be chosen again
  } });
  const path = h("input", { type: "text", id: `${id}-path`, placeholder: "path of a film where the kernel runs" });
  const open = (source, name) => send({ do: "open", source, name });
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); if (path.value) open(path.value, ""); } },
    h("label", { for: `${id}-path` }, "or a path"), path, h("button", { type: "submit" }, "Open"));
  const node = h("section", { class: "open", "aria-label": "Choose a film" },
    h("label", { class: "films", for: `${id}-films` }, "Film of the run"), select,
    h("label", { for: `${id}-file` }, "or a file (DICOM, PNG, JPEG)"), picker, form);
  function drawChoice() { // a film from elsewhere is none of the list
    const { name } = model.get("film");
    select.value = [...select.options].some((option) => option.value === name) ? name : "";
  }
  function draw() {
    const about = model.get("about"), films = about.films || [];
    node.hidden = Boolean(about.frozen);
    form.hidden = about.paths === false;
    select.hidden = node.querySelector(".films").hidden = !films.length;
    fill(select, h("option", { value: "" }, "choose ..."), ...films.map((name) => h("option", { value: name }, name)));
    drawChoice();
  }
  return { node, draw, drawChoice };
}

function report(model, send) {
  const buttons = h("div", { class: "buttons" }, ...[["text", "Text"], ["json", "JSON"], ["fhir", "FHIR"],
    ["dicom", "DICOM SEG of the regions"]].map(([kind, text]) => h("button", { "data-export": kind,
    onclick: () => send({ do: "export", kind }) }, text)));
  const text = h("pre", { tabindex: 0, "aria-label": "Assembled report" });
  const changes = h("ul", {});
  const node = h("section", { class: "report", "aria-label": "Report" }, h("h3", {}, "Report"), text,
    h("details", { class: "changes" }, h("summary", {}, "What became of each sentence"), changes),
    h("div", { class: "export" }, h("b", {}, "Export"), buttons));
  function draw() {
    const told = model.get("report");
    node.hidden = !model.get("film").picture;
    fill(text, told.text || "Nothing has been written yet.");
    const altered = told.changes || [];
    node.querySelector(".changes").hidden = !altered.length;
    fill(changes, ...altered.map((one) => h("li", {}, h("b", {}, one.outcome), ` ${one.words} `, h("i", {}, one.why))));
    for (const button of buttons.children) button.disabled = !told.text && button.dataset.export !== "dicom";
  }
  return { node, draw };
}

function compared(model, grid) {
  const whole = h("p", {});
  const lacking = h("ul", {});
  const narrative = h("div", {}, h("h3", {}, "The narrative model's report"), grid.node);
  const truth = h("div", {}, h("h3", {}, "The true report"), whole, lacking);
  const node = h("section", { class: "compared", "aria-label": "To compare" }, narrative, truth);
  function draw() {
    const told = model.get("truth"), said = new Set(model.get("sentences").map((one) => one.topic));
    narrative.hidden = !model.get("narrative").length;
    truth.hidden = !told.report && !told.topics;
    fill(whole, told.report || "");
    const left = Object.entries(told.topics || {}).filter(([topic]) => !said.has(topic));
    fill(lacking, ...left.map(([topic, text]) => h("li", {}, h("b", {}, topic.replace(/^\w+-/, "")), ` not asked: ${text}`)));
    node.hidden = narrative.hidden && truth.hidden;
  }
  return { node, draw };
}

function render({ model, el }) {
  const id = `room-${Math.random().toString(36).slice(2)}`; // several rooms on a page need different ids
  const view = { masks: true, hidden: new Set(), side: "film" };
  const send = (content, buffers = []) => model.send(content, undefined, buffers);
  const sign = h("p", { class: "sign", role: "status", "aria-live": "polite" });
  const doing = h("span", { role: "status", "aria-live": "polite" }), bar = h("progress", { "aria-label": "Progress" });
  const busy = h("div", { class: "busy" }, bar, doing);
  const log = h("p", { class: "log" });
  const writing = h("button", { class: "write", onclick: () => send({ do: "write", anyway: true }) }, "Write");
  const warning = h("p", { class: "warning", role: "note" });

  let loading = {};
  function drawBusy() {
    const now = loading.what ? loading : model.get("busy");
    busy.classList.toggle("idle", !now.what);
    if (now.of) { bar.max = now.of; bar.value = now.done; } else bar.removeAttribute("value");
    const far = now.of && now.of < 1000 ? ` ${now.done} of ${now.of}` : now.of ? ` ${percent(now.done / now.of)}` : "";
    fill(doing, now.what ? `${now.what}${far} ...` : "");
    el.firstChild?.setAttribute("aria-busy", String(Boolean(now.what)));
  }
  const upload = uploader(model, send, (what) => { loading = what; drawBusy(); });
  downloader(model);

  const film = viewer(model, view, id), choice = topics(model, send), start = opener(model, send, upload, id);
  const said = sentences(model, send, "Sentences", "sentences", true);
  const told = sentences(model, send, "Sentences of the narrative", "narrative", false);
  const beside = compared(model, told), end = report(model, send);
  function drawSign() {
    const now = model.get("sign");
    sign.className = `sign ${now.level || "none"}`;
    fill(sign, now.text ? h("b", {}, `${LEVELS[now.level]}: `) : null, now.text || "");
    fill(writing, model.get("film").status && model.get("film").status !== "ok" ? "Write all the same" : "Write");
    writing.disabled = !model.get("topics").some((one) => one.asked);
  }
  function drawAbout() {
    fill(warning, h("b", {}, "Not for clinical use. "), model.get("about").model || "");
    start.draw();
  }
  function drawLog() {
    fill(log, model.get("log").map((one) => `${one.what} ${one.seconds.toFixed(1)} s`).join(" · "));
  }
  let shown = "";
  function forgetOther() {
    const name = model.get("film").name || "";
    if (name !== shown) said.forget();
    shown = name;
  }
  const draws = {
    about: [drawAbout, choice.draw], film: [film.draw, drawSign, end.draw, start.drawChoice, forgetOther], masks: [film.drawToggles, film.draw],
    gaze: [film.draw, said.draw, told.draw], topics: [choice.draw, drawSign],
    sentences: [said.draw, beside.draw], narrative: [told.draw, beside.draw], truth: [said.draw, beside.draw],
    report: [end.draw], sign: [drawSign], busy: [drawBusy], log: [drawLog],
  };

  const root = h("div", { class: "llava-room", id, "data-lm-suppress-shortcuts": "true", "data-film": "" },
    h("h2", {}, "Reading room"), warning, start.node, sign, busy,
    h("div", { class: "panes" }, film.node, h("div", { class: "words" },
      h("div", { class: "asking" }, choice.node, writing), said.node,
      h("p", { class: "keys" }, "Arrow keys move through sentences and words, Enter shows where they look, ",
        "Esc clears, E edits, M and 1 to 7 switch regions."), beside.node, end.node)),
    h("details", { class: "logs" }, h("summary", {}, "Log"), log));
  root.addEventListener("keydown", (event) => {
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "checkbox") return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") send({ do: "look", item: "", word: -1 });
    else if (event.key === "m" || event.key === "M") film.toggle(0);
    else if (/^[1-7]$/.test(event.key)) film.toggle(Number(event.key));
    else return;
    event.preventDefault();
  });
  const over = (event, on) => { event.preventDefault(); root.classList.toggle("over", on); };
  root.addEventListener("dragover", (event) => over(event, true));
  root.addEventListener("dragleave", (event) => over(event, false));
  root.addEventListener("drop", (event) => { over(event, false); upload(event.dataTransfer.files[0]); });

  const listeners = Object.entries(draws).map(([name, every]) => [`change:${name}`, () => every.forEach((draw) => draw())]);
  for (const [name, listener] of listeners) model.on(name, listener);
  el.replaceChildren(root);
  for (const [, listener] of listeners) listener();
  return () => { for (const [name, listener] of listeners) model.off(name, listener); };
}

export default { render };
