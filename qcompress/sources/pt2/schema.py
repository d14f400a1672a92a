"""The JSON of an exported program: every record, its keys, and the type of each key's value.

This table is an allow-list. A key that is not in it is refused, because nothing is known about what torch does with its
value. A test compares it with the dataclasses of `torch._export.serde.schema`, so a torch that adds a key fails there.

A type is written as in Python: `list[X]`, `dict[K, V]`, `X | None`, where X is a record of this table or one of the
forms in `FORMS` of the module that checks (`name`, `expression`, `operator`, …). A form defines the allowed strings.
"""

from collections.abc import Mapping
from typing import Final

# The newest torch, and its version of the schema, whose keys are all in the table. Between versions with the same
# first number torch only adds keys.
NEWEST_TORCH: Final = "2.13"
SCHEMA_VERSION: Final = (8, 20)

RECORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "ExportedProgram": {
        "graph_module": "GraphModule",
        "opset_version": "dict[text, int]",
        "range_constraints": "dict[expression, RangeConstraint]",
        "schema_version": "SchemaVersion",
        "verifiers": "verifiers",
        "torch_version": "text",
        "guards_code": "guards",
    },
    "SchemaVersion": {"major": "int", "minor": "int"},
    "RangeConstraint": {"min_val": "int | None", "max_val": "int | None"},
    "GraphModule": {
        "graph": "Graph",
        "signature": "GraphSignature",
        "module_call_graph": "list[ModuleCallEntry]",
        "metadata": "left_out",
        "treespec_namedtuple_fields": "left_out",
    },
    "ModuleCallEntry": {"fqn": "qualified_name", "signature": "ModuleCallSignature | None"},
    "ModuleCallSignature": {
        "inputs": "list[Argument]",
        "outputs": "list[Argument]",
        "in_spec": "tree",
        "out_spec": "tree",
        "forward_arg_names": "list[name] | None",
    },
    "Graph": {
        "inputs": "list[InputArgument]",
        "outputs": "list[Argument]",
        "nodes": "list[Node]",
        "tensor_values": "dict[name, TensorMeta]",
        "sym_int_values": "dict[name, SymInt]",
        "sym_bool_values": "dict[name, SymBool]",
        "sym_float_values": "dict[name, SymFloat]",
        "is_single_tensor_return": "bool",
        "custom_obj_values": "no_custom_objects",
    },
    "Node": {
        "target": "operator",
        "inputs": "list[NamedArgument]",
        "outputs": "list[Argument]",
        "metadata": "origins",
        "is_hop_single_tensor_return": "bool | None",
        "name": "name | None",
    },
    "NamedArgument": {"name": "argument_name", "arg": "Argument", "kind": "enum | None"},
    # --- values
    "Argument": {
        "as_none": "bool",
        "as_bool": "bool",
        "as_bools": "list[bool]",
        "as_int": "int",
        "as_ints": "list[int]",
        "as_int_lists": "list[list[int]]",
        "as_float": "float",
        "as_floats": "list[float]",
        "as_float_lists": "list[list[float]]",
        "as_complex": "ComplexValue",
        "as_string": "text",
        "as_strings": "list[text]",
        "as_string_to_argument": "dict[qualified_name, Argument]",
        "as_tensor": "TensorArgument",
        "as_tensors": "list[TensorArgument]",
        "as_nested_tensors": "list[list[TensorArgument]]",
        "as_optional_tensor": "OptionalTensorArgument",
        "as_optional_tensors": "list[OptionalTensorArgument]",
        "as_sym_int": "SymIntArgument",
        "as_sym_ints": "list[SymIntArgument]",
        "as_sym_bool": "SymBoolArgument",
        "as_sym_bools": "list[SymBoolArgument]",
        "as_sym_float": "SymFloatArgument",
        "as_sym_floats": "list[SymFloatArgument]",
        "as_scalar_type": "enum",
        "as_memory_format": "enum",
        "as_layout": "enum",
        "as_device": "Device",
        "as_graph": "GraphArgument",
        "as_operator": "operator",
        "as_custom_obj": "custom_object",
    },
    # An Argument that is an input: torch writes the text of a constant one into Python source, in quotes.
    "InputArgument": {
        "as_none": "bool",
        "as_bool": "bool",
        "as_int": "int",
        "as_float": "float",
        "as_string": "quotable_text",
        "as_tensor": "TensorArgument",
        "as_sym_int": "SymIntArgument",
        "as_custom_obj": "custom_object",
    },
    "ComplexValue": {"real": "float", "imag": "float"},
    "Device": {"type": "text", "index": "int | None"},
    "TensorArgument": {"name": "name"},
    "TokenArgument": {"name": "name"},
    "OptionalTensorArgument": {"as_tensor": "TensorArgument", "as_none": "bool"},
    "GraphArgument": {"name": "name", "graph": "Graph"},
    "SymIntArgument": {"as_name": "name", "as_int": "int"},
    "SymBoolArgument": {"as_name": "name", "as_bool": "bool"},
    "SymFloatArgument": {"as_name": "name", "as_float": "float"},
    # --- sizes
    "TensorMeta": {
        "dtype": "enum",
        "sizes": "list[SymInt]",
        "requires_grad": "bool",
        "device": "Device",
        "strides": "list[SymInt]",
        "storage_offset": "SymInt",
        "layout": "enum",
    },
    "SymInt": {"as_expr": "SymExpr", "as_int": "int"},
    "SymBool": {"as_expr": "SymExpr", "as_bool": "bool"},
    "SymFloat": {"as_expr": "SymExpr", "as_float": "float"},
    "SymExpr": {"expr_str": "expression", "hint": "SymExprHint | None"},
    "SymExprHint": {"as_int": "int", "as_bool": "bool", "as_float": "float"},
    # --- inputs and outputs
    "GraphSignature": {"input_specs": "list[InputSpec]", "output_specs": "list[OutputSpec]"},
    "InputSpec": {
        "user_input": "UserInputSpec",
        "parameter": "InputToParameterSpec",
        "buffer": "InputToBufferSpec",
        "tensor_constant": "InputToTensorConstantSpec",
        "constant_input": "InputToConstantInputSpec",
        "token": "InputTokenSpec",
        "custom_obj": "custom_object",
    },
    "UserInputSpec": {"arg": "InputArgument"},
    "InputToParameterSpec": {"arg": "TensorArgument", "parameter_name": "qualified_name"},
    "InputToBufferSpec": {"arg": "TensorArgument", "buffer_name": "qualified_name", "persistent": "bool"},
    "InputToTensorConstantSpec": {"arg": "TensorArgument", "tensor_constant_name": "qualified_name"},
    "InputToConstantInputSpec": {"name": "name", "value": "ConstantValue"},
    "InputTokenSpec": {"arg": "TokenArgument"},
    "ConstantValue": {
        "as_none": "bool",
        "as_bool": "bool",
        "as_int": "int",
        "as_float": "float",
        "as_string": "quotable_text",
    },
    "OutputSpec": {
        "user_output": "UserOutputSpec",
        "loss_output": "LossOutputSpec",
        "buffer_mutation": "BufferMutationSpec",
        "gradient_to_parameter": "GradientToParameterSpec",
        "gradient_to_user_input": "GradientToUserInputSpec",
        "user_input_mutation": "UserInputMutationSpec",
        "token": "OutputTokenSpec",
        "parameter_mutation": "ParameterMutationSpec",
    },
    "UserOutputSpec": {"arg": "Argument"},
    "LossOutputSpec": {"arg": "TensorArgument"},
    "BufferMutationSpec": {"arg": "TensorArgument", "buffer_name": "qualified_name"},
    "ParameterMutationSpec": {"arg": "TensorArgument", "parameter_name": "qualified_name"},
    "GradientToParameterSpec": {"arg": "TensorArgument", "parameter_name": "qualified_name"},
    "GradientToUserInputSpec": {"arg": "TensorArgument", "user_input_name": "qualified_name"},
    "UserInputMutationSpec": {"arg": "TensorArgument", "user_input_name": "qualified_name"},
    "OutputTokenSpec": {"arg": "TokenArgument"},
    # --- the tables of weights and constants beside the graph
    "PayloadConfig": {"config": "dict[text, PayloadMeta]"},
    "PayloadMeta": {
        "path_name": "text",
        "is_param": "bool",
        "use_pickle": "bool",
        "tensor_meta": "TensorMeta | None",
    },
}

# Records that are given exactly one of their keys.
UNIONS: Final = frozenset(
    {
        "Argument",
        "ConstantValue",
        "InputArgument",
        "InputSpec",
        "OptionalTensorArgument",
        "OutputSpec",
        "SymBool",
        "SymBoolArgument",
        "SymExprHint",
        "SymFloat",
        "SymFloatArgument",
        "SymInt",
        "SymIntArgument",
    }
)
