"""An OpenAI-compatible endpoint over prefill and decode meshes.

    client ── HTTP ──► server.py ──► frontend.py ──► router.py decides ──► hub.py ── zmq ──► worker.py, one a rank
                                                                                            prefill ══ K/V ══► decode

HTTP        server.py, completions.py (answers a request), api.py (checks it), answers.py (text of tokens), shapes.py (its
            JSON), refusal.py (says no), web.py (beneath), metrics.py, page/
between     generation.py: what is asked of whatever generates
generation  frontend.py has those in flight, flight.py follows one from prompt tokens to its last token, over the loss of a
            rank if need be; router.py (pure) says which ranks serve it and why, from what ranks.py and conversations.py
            remember and pace.py has measured; hub.py knows the workers; protocol.py is what passes to and fro
a rank      worker.py is its process, connection.py its way to the hub, meeting.py its way to other workers; rank.py,
            prefill_rank.py and decode_rank.py do the work, under scheduler.py (pure), which says what comes next
commands    commands.py is the command line, cluster.py the processes
"""
