// What every view needs from Gradio: its element, its data, and calls to the server.

const nameOf = (node) =>
  node.id || `${node.tagName} ${node.getAttribute("aria-label") || node.textContent}`;

/**
 * Connects a view with Gradio's component.
 * @param {{element: HTMLElement, props: any, server: any, watch: (name: string, run: () => void) => void}} gradio
 */
export function connect({ element, props, server, watch }) {
  const root = () => element.querySelector(".atelier");

  /**
   * Draws whenever Python sends new data. A press delays drawing until it ends, so that the button
   * under the pointer is not replaced.
   */
  function drawWith(draw) {
    let isPressed = false,
      isDue = false;
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
   */
  function keepingFocus(draw) {
    const before = document.activeElement;
    if (!root().contains(before)) return draw();
    const name = nameOf(before),
      { value, selectionStart, selectionEnd } = before,
      edited = before.edited && before.edited();
    draw();
    if (root().contains(document.activeElement)) return;
    const after = before.isConnected
      ? before
      : [...root().querySelectorAll("button, a, input, select, summary, textarea")].find(
          (node) => nameOf(node) === name,
        );
    if (!after) return;
    if (edited && after.value !== value) {
      after.value = value;
      after.dispatchEvent(new Event("input"));
    }
    after.focus({ preventScroll: true });
    // Buttons and number fields have no selection.
    if (Number.isInteger(selectionStart)) after.setSelectionRange(selectionStart, selectionEnd);
  }

  /** Calls a server function. `onerror` receives its error message or that of a lost connection. */
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
