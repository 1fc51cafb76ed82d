// What can be taken home: the pictures, the animation, and how to make the same elsewhere.

import { ask, decisions } from "./api.js";
import { hasKey } from "./key.js";

const $ = (id) => document.getElementById(id);

export function savePngs(tiles) {
  for (const { link } of tiles) link.click();
}

export async function saveGif(id, seed) {
  const answer = await ask(`jobs/${id}/trajectory`, { headers: { accept: "image/gif" } }).catch((refusal) => {
    if (refusal.status !== 404 && refusal.status !== 410) throw refusal;
    throw Object.assign(refusal, { message: "The server no longer has this job; Build makes it again." });
  });
  const link = Object.assign(document.createElement("a"), { download: `${seed}.gif` });
  link.href = URL.createObjectURL(await answer.blob());
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Everything that decides the picture, and nothing that does not. */
export function recipes(request) {
  const { frames, priority, deadline_s, webhook, ...decides } = request;
  const body = JSON.stringify(decisions(decides));
  const url = new URL("generate", location.href).href;
  const [flag, environ, header] = hasKey() ? // the key itself does not belong into a clipboard
    [` -H "authorization: Bearer $DDPM_KEY"`, "from os import environ\n",
      `, "authorization": "Bearer " + environ["DDPM_KEY"]`] : ["", "", ""];
  $("curl").textContent = `curl ${url}${flag} -H 'content-type: application/json' \\\n` +
    `  -d '${body}' -o ${request.seed}.png`;
  $("python").textContent = `${environ}from urllib.request import Request, urlopen\n\nbody = b'${body}'\n` +
    `request = Request("${url}", body, {"content-type": "application/json"${header}})\n` +
    `with urlopen(request) as answer, open("${request.seed}.png", "wb") as file:\n    file.write(answer.read())`;
}

export async function copy(button) {
  const source = $(button.dataset.copies);
  const words = (button.dataset.words ??= button.textContent);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch { // browsers give the clipboard to https and localhost only
    getSelection().selectAllChildren(source);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = words; }, 1500);
}
