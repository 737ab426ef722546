// The message after a file was dropped on the page.

import { notice } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { drawWith } = connect(gradio);
  drawWith((root, view) => {
    root.replaceChildren(view.said ? notice(view.said, "quiet") : "");
  });
}
