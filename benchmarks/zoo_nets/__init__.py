"""The nets of the zoo: a file per group of families, each with a table."""

from itertools import chain

from zoo_nets import detection, generative, hf, speech, tabular_and_text, vision
from zoo_nets.net import Net

NETS: dict[str, Net] = {
    net.name: net
    for net in chain(vision.NETS, detection.NETS, hf.NETS, speech.NETS, generative.NETS, tabular_and_text.NETS)
}
