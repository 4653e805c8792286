"""Run parts of the tests again where other users are: as an ordinary user, and on Debian 13.

``make test`` does both when it is root and this machine allows it, in mount namespaces that end
with them; otherwise each says why it is skipped.
"""
