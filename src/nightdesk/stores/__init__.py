"""Where the desk remembers: one file per kind of store, all with the same few verbs.

Comes from: kernel/switch.py (contexts), orders/ (intents and fills), risk/gate.py (the kill switch)
Goes to: model/serializer.py (what the bytes of a context mean)

What the stores that live in a directory have in common stands beside them: `_directory.py`
(start, stop, failure), `_writer.py` (group commit), `_lock.py` (one desk per directory),
`_seal.py` (checksums); `_tools.py` is what `nightdesk state ...` calls.
"""
