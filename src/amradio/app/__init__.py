"""The app: one page in the browser to see what a backbone sees (`amradio app`; needs the extra ``[app]``).

It computes nothing by itself: what the page asks for is answered by functions of the rooms below, drawn by
`amradio.viz`, and brought to the page by Gradio. Importing this package imports no Gradio.

```text
page.py, wiring.py, markup.py    what is on the page, which event calls which function, HTML
features.py ... find.py          a function for each thing that can be done on the page; they know no Gradio
redraw.py                        which of them has to be called again, after anything changed
visit.py, sessions.py, photos.py who asks, their photos and results, in memory only
model.py, collection.py          the model with its outputs, and the pictures that the command was started with
gate.py, uploads.py, limits.py   what is let in, and how much of it
server.py                        the server
```
"""
