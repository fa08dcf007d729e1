"""Model families: each constructor returns a plain `nn.Module` of named, traceable parts."""

from qexp.models.encoder import bert_tiny_random
from qexp.models.hugging_face import hugging_face_encoder
from qexp.models.minilm import minilm
from qexp.models.mobilenet import mobilenet, mobilenet_v2
from qexp.models.resnet import resnet8, resnet18

__all__ = ["bert_tiny_random", "hugging_face_encoder", "minilm", "mobilenet", "mobilenet_v2", "resnet8", "resnet18"]
