// The management API, as this page uses it. Nothing here touches the document.

/** The server did not answer at all. */
export class Gone extends Error {}

/** The server wants a token, or another one. */
export class Locked extends Error {}

const TOKEN = "blockflow-token";

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

async function send(path, options) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw new Gone(String(error));
  }
  if (response.status === 401) throw new Locked();
  return response;
}

/** GET; null where this server has no such resource. */
export async function get(path) {
  const response = await send(path, { signal: AbortSignal.timeout(5000) });
  if (response.status === 404) return null;
  const body = await read(response);
  if (!response.ok) throw new Gone(body.error);
  return body;
}

/** What a change was answered with: `{ok, status, body}`. It takes as long as the server takes. */
export async function change(method, path, text, headers) {
  const response = await send(path, { method, body: text, headers });
  return { ok: response.ok, status: response.status, body: await read(response) };
}

async function read(response) {
  try {
    return await response.json();
  } catch (error) {
    // An answer that breaks off is no answer; one that is complete but no JSON is not our API's.
    if (error instanceof SyntaxError) {
      return { error: `the server answered ${response.status} without JSON`, problems: [] };
    }
    throw new Gone(String(error));
  }
}

/**
 * Follow the server-sent events at `path` until the stream ends; false where there is no such path.
 * By fetch and not EventSource, which cannot send the token.
 */
export async function follow(path, heard) {
  const response = await send(path, { headers: { Accept: "text/event-stream" } });
  if (response.status === 404) return false;
  if (!response.ok || !response.body) throw new Gone(`${path} answered ${response.status}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return true;
      rest += value.replaceAll("\r\n", "\n");
      const messages = rest.split("\n\n");
      rest = messages.pop();
      messages.map(parseEvent).filter(Boolean).forEach(heard);
    }
  } catch (error) {
    throw new Gone(String(error));
  }
}

function parseEvent(block) {
  const event = { type: "message", data: "", id: null };
  const data = [];
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "event") event.type = value;
    if (field === "id") event.id = value;
    if (field === "data") data.push(value);
  }
  if (data.length === 0) return null; // a comment that keeps the connection alive
  return { ...event, data: data.join("\n") };
}
