"""The status page's numbers from what ``/metrics`` says."""

from prometheus_client.parser import text_string_to_metric_families

from vase_vllm.status.snapshot import summarize

TEXT = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3
vllm:num_requests_running{engine="1"} 4
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 2
vllm:num_preemptions_created{engine="0"} 1.7e9
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{engine="0",num_gpu_blocks="101"} 1
vllm:cache_config_info{engine="1",num_gpu_blocks="101"} 1
# TYPE vllm:kv_eviction_held_tokens gauge
vllm:kv_eviction_held_tokens{engine="0"} HELD
# TYPE vllm:kv_eviction_logical_tokens gauge
vllm:kv_eviction_logical_tokens{engine="0"} 1000
"""


def numbers(held):
    return summarize(text_string_to_metric_families(TEXT.replace("HELD", held)))


def test_engines_are_added_up():
    found = numbers("250")
    assert found["running_requests"] == 7
    assert found["preemptions"] == 2
    assert (found["blocks"], found["used_blocks"]) == (200, 75)
    assert found["compression"] == 4


def test_no_request_has_no_compression():
    assert numbers("0")["compression"] is None
