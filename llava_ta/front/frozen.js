// Runs the front end on a page without a kernel. `told` holds id, state, gazes, code and style.
const { id, state, gazes, code, style } = told;
const place = document.getElementById(id), inner = document.createElement("div"), heard = {};
place.replaceChildren(Object.assign(document.createElement("style"), { textContent: style }), inner);

function show(name, value) {
  state[name] = value;
  for (const listen of heard[`change:${name}`] ?? []) listen();
}

const model = {
  get: (name) => state[name],
  on: (name, listen) => (heard[name] ??= []).push(listen),
  off: () => {},
  send: (message) => {
    const found = message.do !== "look" ? null : message.item ? gazes[`${message.item} ${message.word}`] : {};
    if (found) show("gaze", found);
    else show("sign", { level: "warn", text: "This is a picture of the room, without a model behind it." });
  },
};
const front = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
front.default.render({ model, el: inner });
