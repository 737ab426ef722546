"""The four tabs of the page: Gradio components and their events, one module per tab."""
