// The large view of an image: its caption, its crop to drag and its mask to paint.

import { el, button } from "../../lib/dom.js";

export function createImageDialog(context) {
  function openImage(view, card) {
    const index = view.cards.indexOf(card);
    const canvas = el("canvas", {
      class: "at-paint",
      hidden: true,
      "aria-label": "Mask: paint over what should not be learned",
    });
    const image = el("img", {
      src: card.large,
      alt: card.caption || card.file,
      draggable: "false",
    });
    const frame = el("div", {
      class: "at-frame",
      tabindex: "0",
      role: "slider",
      "aria-label": "Crop; move it with the arrow keys",
      "aria-valuetext": "",
    });
    const stage = el(
      "div",
      {
        class: "at-stage",
        style: `aspect-ratio:${card.ratio};width:min(100%, calc(62vh * ${card.ratio}))`,
      },
      image,
      frame,
      canvas,
    );
    const note = el("p", { class: "at-hint", role: "status" });
    const showStatus = (text) => {
      note.textContent = text;
    };
    const { box, saved, tokens, save } = context.captionBox(view, card);
    const bar = el("div", { class: "at-row" });
    const leave = async () => {
      await save();
      await tools.mask.keep();
      if (
        (box.unsaved || canvas.unsaved) &&
        !confirm("The change could not be saved. Close the image anyway?")
      )
        return false;
      // A second key may have been pressed during the save.
      const isFirst = dialog.open;
      dialog.close();
      return isFirst;
    };
    const step = async (by) => {
      if (await leave())
        openImage(view, view.cards[(index + by + view.cards.length) % view.cards.length]);
    };
    const escape = (event) => {
      // Cancelling the file dialog inside sends this event too.
      if (event.target !== dialog) return;
      event.preventDefault();
      leave();
    };
    const dialog = el(
      "dialog",
      {
        class: "at-lightbox at-editor",
        oncancel: escape,
        onclose: () => {
          dialog.remove();
          context.load({ turn: !context.memory.edited });
          context.memory.edited = false;
        },
        onkeydown: (event) => {
          if (event.altKey && event.key === "ArrowRight") step(1);
          if (event.altKey && event.key === "ArrowLeft") step(-1);
        },
      },
      el(
        "div",
        { class: "at-row" },
        el("strong", { class: "at-name" }, card.file),
        el("span", { class: "at-hint" }, card.size),
        el("span", { class: "at-push" }),
        button("←", () => step(-1), "at-small"),
        button("→", () => step(1), "at-small"),
        button("Close", leave, "at-small"),
      ),
      stage,
      bar,
      note,
      box,
      el("div", { class: "at-row" }, tokens, saved),
    );
    // The dialog is outside of the view, so it needs the class that our styles apply to.
    dialog.classList.add("atelier");
    const tools = {
      crop: cropTools(card, frame, stage, showStatus),
      mask: maskTools(card, canvas, image, showStatus),
    };
    const choose = (mode) => {
      const tab = (name, text) =>
        el(
          "button",
          {
            type: "button",
            class: `at-button at-small ${mode === name ? "at-chosen" : ""}`,
            "aria-pressed": mode === name ? "true" : "false",
            onclick: () => choose(name),
          },
          text,
        );
      bar.replaceChildren(tab("crop", "Crop"), tab("mask", "Mask"), ...tools[mode].buttons);
      for (const [name, tool] of Object.entries(tools)) tool.show(name === mode);
    };
    document.body.append(dialog);
    dialog.showModal();
    choose("crop");
  }

  function cropTools(card, frame, stage, showStatus) {
    const showFrame = () => {
      const [left, top, right, bottom] = card.box;
      Object.assign(frame.style, {
        left: `${100 * left}%`,
        top: `${100 * top}%`,
        width: `${100 * (right - left)}%`,
        height: `${100 * (bottom - top)}%`,
      });
      frame.setAttribute(
        "aria-valuetext",
        `${Math.round(50 * (left + right))} % from left, ${Math.round(50 * (top + bottom))} % from top`,
      );
    };
    const show = (chosen) => {
      frame.hidden = !chosen;
      if (!chosen) return;
      const [left, top, right, bottom] = card.box,
        part = Math.round(100 * (right - left) * (bottom - top));
      showFrame();
      showStatus(
        `Trained at ${card.bucket[0]} × ${card.bucket[1]}${part < 100 ? `, ${part} % of the image; drag the frame to choose which part` : ", the whole image"}.`,
      );
    };
    const shift = (x, y) => {
      // The crop keeps its size and stays inside the image.
      const [left, top, right, bottom] = card.box,
        dx = Math.min(Math.max(x, -left), 1 - right),
        dy = Math.min(Math.max(y, -top), 1 - bottom);
      card.box = [left + dx, top + dy, right + dx, bottom + dy];
      showFrame();
    };
    const keep = async (centre) => {
      const answer = await context.call("move_crop", { file: card.file, centre }, showStatus);
      if (answer.error) return;
      context.memory.edited = true;
      Object.assign(card, { box: answer.box, bucket: answer.bucket, moved: answer.moved });
      context.setUndo(answer.undo);
      show(!frame.hidden);
    };
    const middle = () => [(card.box[0] + card.box[2]) / 2, (card.box[1] + card.box[3]) / 2];
    let from = null,
      waiting = null;
    frame.addEventListener("pointerdown", (event) => {
      from = [event.clientX, event.clientY];
      frame.setPointerCapture(event.pointerId);
      event.preventDefault();
      frame.focus();
    });
    frame.addEventListener("pointermove", (event) => {
      if (!from) return;
      const size = stage.getBoundingClientRect();
      shift((event.clientX - from[0]) / size.width, (event.clientY - from[1]) / size.height);
      from = [event.clientX, event.clientY];
    });
    frame.addEventListener("pointerup", () => {
      if (from) {
        from = null;
        keep(middle());
      }
    });
    frame.addEventListener("keydown", (event) => {
      const by = {
        ArrowLeft: [-0.02, 0],
        ArrowRight: [0.02, 0],
        ArrowUp: [0, -0.02],
        ArrowDown: [0, 0.02],
      }[event.key];
      if (!by || event.altKey) return;
      event.preventDefault();
      shift(...by);
      clearTimeout(waiting);
      waiting = setTimeout(() => keep(middle()), 400);
    });
    return { show, buttons: [button("Reset crop", () => keep(null), "at-small")] };
  }

  // In a mask file white is learned and black is not. The dialog shows the black part in red.

  function maskTools(card, canvas, image, showStatus) {
    const paper = canvas.getContext("2d"),
      pen = { size: 0.08, white: false };
    let chosen = false,
      prepared = null,
      last = null;
    const prepare = async () => {
      if (!image.naturalWidth)
        await new Promise((done) => image.addEventListener("load", done, { once: true }));
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      if (card.mask) await fromMask(card.mask);
    };
    // Painting and saving wait until the image and its mask are loaded.
    const ready = () => (prepared ??= prepare());
    const show = async (isChosen) => {
      chosen = isChosen;
      canvas.hidden = true;
      if (!chosen) return;
      showStatus("Paint over what should not be learned. It turns red.");
      await ready();
      canvas.hidden = !chosen;
    };
    const fromMask = (src) =>
      new Promise((done) => {
        const mask = new Image();
        mask.onload = () => {
          paper.globalCompositeOperation = "copy";
          paper.drawImage(mask, 0, 0, canvas.width, canvas.height);
          const pixels = paper.getImageData(0, 0, canvas.width, canvas.height);
          for (let i = 0; i < pixels.data.length; i += 4)
            pixels.data.set([200, 30, 20, 255 - pixels.data[i]], i);
          paper.putImageData(pixels, 0, 0);
          done();
        };
        mask.onerror = done;
        mask.src = src;
      });
    const at = (event) => {
      const size = canvas.getBoundingClientRect();
      return [
        ((event.clientX - size.left) / size.width) * canvas.width,
        ((event.clientY - size.top) / size.height) * canvas.height,
      ];
    };
    const stroke = (event) => {
      const to = at(event);
      paper.globalCompositeOperation = pen.white ? "destination-out" : "source-over";
      Object.assign(paper, {
        lineWidth: pen.size * canvas.width,
        lineCap: "round",
        strokeStyle: "rgb(200 30 20)",
      });
      paper.beginPath();
      paper.moveTo(...(last || to));
      paper.lineTo(to[0] + 0.01, to[1]);
      paper.stroke();
      last = to;
      canvas.unsaved = true;
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      last = null;
      stroke(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) stroke(event);
    });
    let sent = null;
    const send = (name, data, text) => (sent = sending(name, data, text));
    const sending = async (name, data, text) => {
      const before = canvas.unsaved;
      // A stroke before the answer sets it again.
      canvas.unsaved = false;
      const answer = await context.call(name, { file: card.file, ...data }, showStatus);
      if (answer.error) {
        canvas.unsaved ||= before;
        return;
      }
      context.memory.edited = true;
      // The image may be opened again from this card.
      card.mask = answer.mask;
      context.setUndo(answer.undo);
      showStatus(text);
    };
    const save = async () => {
      await ready();
      const grey = document.createElement("canvas"),
        [width, height] = [canvas.width, canvas.height];
      Object.assign(grey, { width, height });
      const pixels = paper.getImageData(0, 0, width, height);
      for (let i = 0; i < pixels.data.length; i += 4)
        pixels.data.set(
          [255 - pixels.data[i + 3], 255 - pixels.data[i + 3], 255 - pixels.data[i + 3], 255],
          i,
        );
      grey.getContext("2d").putImageData(pixels, 0, 0);
      return send("save_mask", { mask: grey.toDataURL("image/png").split(",")[1] }, "Mask saved.");
    };
    const keep = async () => {
      await sent;
      if (canvas.unsaved) await save();
    };
    const clear = () => {
      paper.clearRect(0, 0, canvas.width, canvas.height);
      return send("save_mask", {}, "Mask removed. The whole image is learned.");
    };
    const file = el("input", {
      type: "file",
      accept: "image/*",
      hidden: true,
      onchange: async (event) => {
        const { path } = await context.upload(event.target.files[0]);
        await send("add_mask", { path }, "Mask saved.");
        if (card.mask && !canvas.unsaved) await fromMask(card.mask);
      },
    });
    const eraser = button(
      "Erase",
      () => {
        pen.white = !pen.white;
        eraser.classList.toggle("at-chosen", pen.white);
        eraser.setAttribute("aria-pressed", String(pen.white));
      },
      "at-small",
    );
    const size = el("input", {
      type: "range",
      min: "1",
      max: "30",
      value: "8",
      "aria-label": "Brush size",
      oninput: (event) => {
        pen.size = event.target.value / 100;
      },
    });
    return {
      show,
      keep,
      buttons: [
        eraser,
        el("label", { class: "at-row at-hint" }, "Brush", size),
        button("Save mask", save, "at-small at-primary"),
        button("No mask", clear, "at-small"),
        button("Upload", () => file.click(), "at-small"),
        file,
      ],
    };
  }

  return openImage;
}
