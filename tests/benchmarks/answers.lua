-- A script of wrk: posts the bodies in the files FOLDER/0, FOLDER/1, ... by turns, and prints a summary as JSON.
-- wrk ... -s answers.lua URL -- FOLDER COUNT MEDIA_TYPE
local requests, at = {}, 0

function init(args)
  local folder, count, media_type = args[1], tonumber(args[2]), args[3]
  for number = 0, count - 1 do
    local file = assert(io.open(folder .. "/" .. number, "rb"))
    requests[number] = wrk.format("POST", nil, { ["Content-Type"] = media_type }, file:read("*a"))
    file:close()
  end
end

function request()
  at = (at + 1) % (#requests + 1)
  return requests[at]
end

function done(summary, latency, _)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "failed": %d, "p50": %.6f, "p99": %.6f, "max": %.6f}\n',
    summary.requests, summary.duration / 1e6, failed,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6, latency.max / 1e6))
end
