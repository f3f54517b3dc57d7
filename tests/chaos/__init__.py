"""Random events until something breaks, on the cache itself and on a real server.

An *event* is one random act and everything that is checked after it.  On the cache (``worlds``): a
request opens, alone or on another's prefix; a pass prefills chunks of one request or several; a
pass decodes one token for every running request; a request is aborted, or retracted because pages
or frames ran out; everything is flushed; a backup is poisoned.  On a server (``acts``): one call of
a client, whatever it holds and however it ends.  Passes that SGLang runs for a call, and steps that
one request decodes on the server, are not counted.
"""
