// Talks to the admin API of the host that has served the page: requests with the token of this tab,
// and the stream of changes. Used by the model and by actions. Keeps the token in sessionStorage,
// and nothing else. Sets no cookie.

/** Pause before the stream is opened again, in milliseconds. */
const RETRY = 1000;

const TOKEN = 'token';

export const hasToken = () => sessionStorage.getItem(TOKEN) != null;
export const setToken = (token) => sessionStorage.setItem(TOKEN, token);

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { authorization: 'Bearer ' + token } : {};
}

/** An error answer. `message` is its text for people. */
export class ApiError extends Error {
  constructor(status, document) {
    super(document?.detail ? `${document.error}: ${document.detail}` : `status ${status}`);
    this.status = status;
  }
}

async function request(path, options) {
  const response = await fetch(path, { headers: headers(), cache: 'no-store', ...options });
  if (response.ok) return response.json();
  throw new ApiError(response.status, await response.json().catch(() => null));
}

export const get = (path) => request(path);
export const post = (path) => request(path, { method: 'POST' });

export const backendPath = (pool, backend, action) =>
  `/v1/pools/${encodeURIComponent(pool)}/backends/${encodeURIComponent(backend)}/${action}`;

/** The part before `separator`, and the rest; `null` if the text lacks it. */
function split(text, separator) {
  const at = text.indexOf(separator);
  return at < 0 ? null : [text.slice(0, at), text.slice(at + separator.length)];
}

function deliver(message, handler) {
  let name = 'message';
  let data = '';
  for (const line of message.split('\n')) {
    if (line.startsWith('event:')) name = line.slice(6).trim();
    else if (line.startsWith('data:')) data += line.slice(5);
  }
  if (data) handler(name, JSON.parse(data));
}

async function read(response, handler) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let parts = split(text, '\n\n'); parts; parts = split(text, '\n\n')) {
      deliver(parts[0], handler);
      text = parts[1];
    }
  }
}

/**
 * Reads `/v1/stream` until the page is closed, and opens it again when it ends. Calls
 * `handler(event, document)`; the event `denied` means that the token is missing or wrong.
 */
export async function stream(handler) {
  for (;;) {
    try {
      const response = await fetch('/v1/stream', { headers: headers(), cache: 'no-store' });
      if (response.status === 401) return handler('denied');
      if (response.ok) await read(response, handler);
      else handler('refused', await response.json().catch(() => ({})));
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      // The network failed. After 3 s without an answer, the page shows that its numbers are old.
    }
    await new Promise((resume) => setTimeout(resume, RETRY));
  }
}
