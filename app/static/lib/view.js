// What every view needs from Gradio: its element, its data, and calls to the server.

/**
 * What Gradio passes to a view.
 * @typedef {object} Component
 * @property {HTMLElement} element
 * @property {any} props `value` contains the newest data, or null
 * @property {Record<string, (data: any) => any>} server the server functions of the view
 * @property {(name: string, run: () => void) => void} watch calls `run` when a property changes
 * @property {(name: string, data?: any) => void} trigger sends an event to Python
 * @property {(file: File) => Promise<{path: string}>} upload
 * @property {any} constant
 */

/** @typedef {HTMLInputElement & {edited?: () => boolean}} Control a control that may have the focus */

/** Returns what identifies a control after its view was redrawn. */
const nameOf = (/** @type {Element} */ node) =>
  node.id || `${node.tagName} ${node.getAttribute("aria-label") || node.textContent}`;

/**
 * Connects a view with Gradio's component.
 * @param {Component} gradio
 */
export function connect({ element, props, server, watch }) {
  const root = () => /** @type {HTMLElement} */ (element.querySelector(".atelier"));

  /**
   * Draws whenever Python sends new data. A press delays drawing until it ends, so that the button
   * under the pointer is not replaced.
   * @param {(root: HTMLElement, value: any) => void} draw
   */
  function drawWith(draw) {
    let isPressed = false;
    let isDue = false;
    const again = () => {
      isDue = isPressed;
      if (!isPressed && root() && props.value) keepingFocus(() => draw(root(), props.value));
    };
    const released = () =>
      // The click event follows this one.
      setTimeout(() => {
        isPressed = false;
        if (isDue) again();
      });
    element.addEventListener("pointerdown", () => {
      isPressed = true;
    });
    for (const end of ["pointerup", "pointercancel", "dragend"])
      window.addEventListener(end, released);
    // Later than `mount`, which declares constants below this call.
    queueMicrotask(again);
    watch("value", again);
  }

  /**
   * Draws and keeps the keyboard focus. The new control of the same name gets it, with the text that
   * was being typed if the function `edited` of the old control returns true.
   * @param {() => void} draw
   */
  function keepingFocus(draw) {
    const before = /** @type {Control | null} */ (document.activeElement);
    if (!before || !root().contains(before)) return draw();
    const name = nameOf(before);
    const { value, selectionStart, selectionEnd } = before;
    const edited = before.edited?.();
    draw();
    if (root().contains(document.activeElement)) return;
    const after = before.isConnected ? before : controls().find((node) => nameOf(node) === name);
    if (!after) return;
    if (edited && after.value !== value) {
      after.value = value;
      after.dispatchEvent(new Event("input"));
    }
    after.focus({ preventScroll: true });
    // Buttons and number fields have no selection.
    if (Number.isInteger(selectionStart)) after.setSelectionRange(selectionStart, selectionEnd);
  }

  function controls() {
    /** @type {NodeListOf<Control>} */
    const nodes = root().querySelectorAll("button, a, input, select, summary, textarea");
    return [...nodes];
  }

  /**
   * Calls a server function. If it fails or the connection is lost, `onerror` receives the message.
   * @param {string} name
   * @param {any} data
   * @param {(message: string) => void} onerror
   * @returns {Promise<any>} the answer, with `error` if the call failed
   */
  async function ask(name, data, onerror) {
    let answer;
    try {
      answer = await server[name](data);
    } catch {
      answer = {
        error: "The server of the page did not answer. Check that it is running, then try again.",
      };
    }
    if (answer && answer.error) onerror(answer.error);
    return answer;
  }

  return { root, drawWith, keepingFocus, ask };
}
