// What this browser has made: each job's request, id, status and a small picture. It survives reloads and restarts.

const KEPT = 24;
const ENDED = ["succeeded", "failed", "cancelled"];
const THUMBNAIL = 64; // pixels

export const entries = () => {
  try {
    return JSON.parse(localStorage.getItem("ddpm.jobs") ?? "[]");
  } catch {
    return []; // a browser that keeps nothing
  }
};

function write(list) {
  try {
    localStorage.setItem("ddpm.jobs", JSON.stringify(list));
  } catch {
    if (list.length > 1) write(list.slice(0, list.length >> 1)); // it is full: the older half goes
  }
}

/** Keeps a job, a new one first. The same request is the same picture, so it stands here once. */
export function remember({ id, request }, status, thumbnail) {
  const list = entries();
  const at = list.findIndex((e) => e.id === id || JSON.stringify(e.request) === JSON.stringify(request));
  const entry = { id, request, status, thumbnail: thumbnail ?? list[at]?.thumbnail };
  write(at < 0 ? [entry, ...list].slice(0, KEPT) : list.with(at, entry));
}

export const forget = () => write([]);
export const hasEnded = ({ status }) => ENDED.includes(status);

/** The job on the stage, which a reload finds again. */
export function setCurrent({ id }) {
  try {
    sessionStorage.setItem("ddpm.current", id);
  } catch {
    return; // as above
  }
}

export const current = () => {
  try {
    return entries().find(({ id }) => id === sessionStorage.getItem("ddpm.current"));
  } catch {
    return undefined;
  }
};

/** A picture small enough to be kept, as a data: URL. */
export async function thumbnail(picture) {
  if (!picture) return undefined;
  const bitmap = await createImageBitmap(picture.blob);
  const scale = Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: bitmap.width * scale, height: bitmap.height * scale });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL();
}

export function list(element, chosen, choose) {
  const held = element.contains(document.activeElement) ? document.activeElement.value : null; // by who uses keys
  element.replaceChildren(...entries().map((entry) => {
    const { request: { sampler, steps, seed, n }, status } = entry;
    const button = document.createElement("button");
    const image = document.createElement(entry.thumbnail ? "img" : "i");
    if (entry.thumbnail) Object.assign(image, { src: entry.thumbnail, alt: "" });
    const caption = document.createElement("span");
    caption.textContent = `${seed}${n > 1 ? ` +${n - 1}` : ""}`;
    const how = document.createElement("small");
    how.textContent = status === "succeeded" ? `${sampler} ${steps}` : hasEnded(entry) ? status : "unfinished";
    button.append(image, caption, how);
    button.title = button.ariaLabel = `Seed ${seed}, ${n} of them, ${sampler}, ${steps} steps: ${status}`;
    if (entry.id === chosen) button.ariaCurrent = "true";
    button.value = entry.id;
    button.onclick = () => choose(entry);
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  if (held !== null) element.querySelector(`[value="${CSS.escape(held)}"]`)?.focus();
}
