// The key, where the server needs one: asked for once it says so, and kept as long as this tab is open.

const form = document.getElementById("key");
let kept = ""; // where a browser keeps nothing

const key = () => {
  try {
    return sessionStorage.getItem("ddpm.key") ?? kept;
  } catch {
    return kept;
  }
};

export const hasKey = () => key() !== "";

/** What `fetch` needs besides `options`. */
export const authorized = (options = {}) =>
  hasKey() ? { ...options, headers: { ...options.headers, authorization: `Bearer ${key()}` } } : options;

/** The same for a websocket, which has no headers of ours. The server answers with the first, and repeats no key. */
export function protocols() {
  if (!hasKey()) return [];
  const bytes = String.fromCharCode(...new TextEncoder().encode(key()));
  return ["ddpm.v1", `ddpm.key.${btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`];
}

/** Comes back with a key, which may be a wrong one. */
export function askForKey() {
  document.getElementById("unknown").hidden = !hasKey();
  form.hidden = false;
  form.elements.key.focus();
  return new Promise((done) => form.addEventListener("submit", (event) => {
    event.preventDefault();
    kept = form.elements.key.value.trim();
    try {
      sessionStorage.setItem("ddpm.key", kept);
    } catch { /* it is kept above */ }
    form.reset();
    form.hidden = true;
    done();
  }, { once: true }));
}
