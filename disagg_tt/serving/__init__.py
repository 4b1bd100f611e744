"""An OpenAI-compatible endpoint over prefill and decode meshes.

    client ── HTTP ──► server.py ──► frontend.py ──► router.py decides ──► hub.py ── zmq ──► worker.py, one a rank
                                                                                            prefill ══ K/V ══► decode

server.py speaks OpenAI's API and nothing else (api.py checks requests, completions.py answers them, by answers.py, text of
tokens, and shapes.py, its JSON; refusal.py says no; web.py is the HTTP beneath); generation.py is the seam to frontend.py,
which follows one generation from prompt tokens to its last token, over the loss of a rank if need be; router.py (pure) says
which ranks serve it and why; hub.py knows the workers; worker.py is a rank: engine.py, its model and paged cache, under
scheduler.py (pure), which says what a step does next.
"""
