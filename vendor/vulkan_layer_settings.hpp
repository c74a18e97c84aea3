// Stand-in for the types of VK_EXT_layer_settings, for Vulkan headers older than that extension (Debian 12: 1.3.239).
//
// llama.cpp names them where it makes its Vulkan instance, although it fills them in only for the validation layer:
// https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-vulkan/ggml-vulkan.cpp#L5214-L5224
// Members, their order and the number of the structure are those of the Vulkan specification; a driver that does not
// know the structure passes over it. vendor/install puts this file before every C++ file of the vulkan profile; with
// newer headers it declares nothing.
#pragma once

#include <vulkan/vulkan_core.h>

#ifndef VK_EXT_layer_settings

#include <cstdint>
#include <vector>

namespace vk {

enum class LayerSettingTypeEXT : std::int32_t { eBool32 = 0 };

struct LayerSettingEXT {
    const char * pLayerName;
    const char * pSettingName;
    LayerSettingTypeEXT type;
    std::uint32_t valueCount;
    const void * pValues;
};

struct LayerSettingsCreateInfoEXT {
    VkStructureType sType = static_cast<VkStructureType>(1000496000);
    const void * pNext = nullptr;
    std::uint32_t settingCount;
    const LayerSettingEXT * pSettings;

    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount(static_cast<std::uint32_t>(settings.size())), pSettings(settings.data()) {}
};

}  // namespace vk

#endif
