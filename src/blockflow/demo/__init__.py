"""The demo: `blockflow demo` does BlockFlow's main job on real data and checks every answer.

Three networks that share a trained trunk become four blocks and serve three tasks at once from
two worker processes. Then the same server, while it runs, gets ResNet-50 as four more blocks in
four more processes. Every answer is compared with that of the whole network, called directly.

All of it runs on the CPU. It needs scikit-learn for its handwritten digits, and no internet.
Whatever it writes is in one temporary directory, which is gone afterwards, as are its processes.

`story` tells it; `digits` makes the networks, `trunk` cuts them and asks them, `resnet` does
ResNet-50; `server`, `answers`, `terminal` and `tables` serve these.
"""
