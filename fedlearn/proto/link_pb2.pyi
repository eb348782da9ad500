from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "heartbeat", "start", "chunk", "end", "ack", "retry", "cancel", "goodbye", "fault")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    heartbeat: Heartbeat
    start: Start
    chunk: Chunk
    end: End
    ack: Ack
    retry: Retry
    cancel: Cancel
    goodbye: Goodbye
    fault: Fault
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., retry: _Optional[_Union[Retry, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("message_id", "payload_id", "received_bytes")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    payload_id: int
    received_bytes: int
    def __init__(self, message_id: _Optional[str] = ..., payload_id: _Optional[int] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version_min", "version_max", "incarnation", "facts", "resumes")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_MIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_MAX_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    version_min: int
    version_max: int
    incarnation: bytes
    facts: _containers.ScalarMap[str, str]
    resumes: _containers.RepeatedCompositeFieldContainer[Resume]
    def __init__(self, version_min: _Optional[int] = ..., version_max: _Optional[int] = ..., incarnation: _Optional[bytes] = ..., facts: _Optional[_Mapping[str, str]] = ..., resumes: _Optional[_Iterable[_Union[Resume, _Mapping]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "incarnation", "resumes", "node_id", "wanted")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    version: int
    incarnation: bytes
    resumes: _containers.RepeatedCompositeFieldContainer[Resume]
    node_id: int
    wanted: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., incarnation: _Optional[bytes] = ..., resumes: _Optional[_Iterable[_Union[Resume, _Mapping]]] = ..., node_id: _Optional[int] = ..., wanted: _Optional[_Iterable[str]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("next_within_s",)
    NEXT_WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    next_within_s: float
    def __init__(self, next_within_s: _Optional[float] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("message_id", "reply_to", "payload_id", "metadata", "buffer_bytes", "ttl_s", "offset")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_TO_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    BUFFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    reply_to: str
    payload_id: int
    metadata: bytes
    buffer_bytes: _containers.RepeatedScalarFieldContainer[int]
    ttl_s: float
    offset: int
    def __init__(self, message_id: _Optional[str] = ..., reply_to: _Optional[str] = ..., payload_id: _Optional[int] = ..., metadata: _Optional[bytes] = ..., buffer_bytes: _Optional[_Iterable[int]] = ..., ttl_s: _Optional[float] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("payload_id", "offset", "checksum", "data")
    PAYLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    payload_id: int
    offset: int
    checksum: int
    data: bytes
    def __init__(self, payload_id: _Optional[int] = ..., offset: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("payload_id",)
    PAYLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    payload_id: int
    def __init__(self, payload_id: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    def __init__(self, message_id: _Optional[str] = ...) -> None: ...

class Retry(_message.Message):
    __slots__ = ("payload_id", "offset")
    PAYLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    payload_id: int
    offset: int
    def __init__(self, payload_id: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    def __init__(self, message_id: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("code", "reason")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Fault.Code]
        PROTOCOL: _ClassVar[Fault.Code]
        LIMIT: _ClassVar[Fault.Code]
        VERSION: _ClassVar[Fault.Code]
    UNSPECIFIED: Fault.Code
    PROTOCOL: Fault.Code
    LIMIT: Fault.Code
    VERSION: Fault.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: Fault.Code
    reason: str
    def __init__(self, code: _Optional[_Union[Fault.Code, str]] = ..., reason: _Optional[str] = ...) -> None: ...
