"""What everything speaks: graphs, effects, weight expressions, the decoder's structure, reports."""
