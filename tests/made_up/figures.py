"""A figure of the paper's own."""

import plotly.graph_objects as go

from pipeline.figures.theme import axis, colour, slider


def own_bars(tables, options):
    frame = tables["metrics"]
    frame = frame[frame["name"].str.endswith(".delta_loss")]
    figure = go.Figure(go.Bar(x=frame["name"], y=frame["mean"], marker_color=colour(0)))
    figure.update_layout(yaxis=axis("Δ loss", "nats"))
    return figure, frame


def own_slider(tables, options):
    frame = tables["evaluation/trained_history"]
    frame = frame[frame["sae"] == frame["sae"].iloc[0]].sort_values("rows")
    figure = go.Figure(go.Scatter(x=frame["rows"], y=frame["loss"], mode="lines+markers"))
    ends = [2, len(frame) // 2, len(frame)]
    x, y = frame["rows"].tolist(), frame["loss"].tolist()
    shown = {str(n): [{"x": [x[:n]], "y": [y[:n]]}, {}] for n in ends}
    figure.update_layout(sliders=[slider(shown, "first ", active=2)], yaxis=axis("loss"))
    return figure, frame
