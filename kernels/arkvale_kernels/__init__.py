"""Page ops of recallable KV eviction: digest, score, select, reside, transfer, attend.

Every op is a folder with an ``api.py`` (checks, the public function) and a
``reference.py`` (plain torch, the definition).  The package needs torch alone and
knows nothing of any serving engine.

Ids used by all ops of one layer, which may hold several lanes (KV-head groups):

``lane page``   ``group * page_stride + logical page``; logical page 0 is padding
``lane frame``  ``group * frames + frame``; the last row of a frame buffer is scratch,
                written for tokens whose page is not resident and never read unmasked
"""
