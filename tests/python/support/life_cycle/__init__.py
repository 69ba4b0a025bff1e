"""The life-cycle fuzz: many clients load, replace, unload and use adapters of one server at random.

`catalogue` makes the adapters and what transformers + peft answer with each; `clients` send what their random
numbers say and check each answer at once; `history` decides afterwards whether all that was answered of one
name can have happened in some order; `server` runs the server with a probe of its memory, and with planted
faults (`faults`) that the fuzz must find.
"""
