"""Pictures of timelines. `svg.py`: pictures, pages, terminal lines; `perfetto.py`: a trace."""
