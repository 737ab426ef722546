"""The theme: warm paper, ink, and deep green for buttons. It fetches no font or file."""

import gradio as gr
from gradio.themes.utils import colors, sizes

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "monospace"]


def make_theme() -> gr.themes.Base:
    """Returns the theme with its colours for light and dark mode."""
    # Gradio's subdued text colours fail the contrast of WCAG AA (2.56:1). These pass in both modes.
    return gr.themes.Default(
        primary_hue=colors.teal,
        neutral_hue=colors.stone,
        radius_size=sizes.radius_lg,
        text_size=sizes.text_md,
        font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="#faf8f5",
        body_background_fill_dark="#161412",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#201d1a",
        background_fill_secondary="#f5f2ed",
        background_fill_secondary_dark="#1b1916",
        block_background_fill="#ffffff",
        block_background_fill_dark="#201d1a",
        block_border_color="#e7e2da",
        block_border_color_dark="#38332d",
        border_color_primary="#e0dad0",
        border_color_primary_dark="#423c35",
        block_shadow="none",
        block_shadow_dark="none",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        body_text_color="#292524",
        body_text_color_dark="#ece7e1",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_background_fill="#fdfcfa",
        input_background_fill_dark="#1a1815",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="#efeae3",
        button_secondary_background_fill_dark="#322d28",
        button_secondary_background_fill_hover="#e5ded4",
        button_secondary_background_fill_hover_dark="#3d3731",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )
